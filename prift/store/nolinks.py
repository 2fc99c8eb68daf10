"""Files of a cache, which is data from others: no link is followed, and no pipe waited for."""

import os
import stat
from pathlib import Path

from prift.errors import CacheError


def inside(root: Path, *names: str) -> Path:
    """root/name/...: each a folder of its own, or absent. `root` itself may be a link. Raises
    CacheError for a link, which leads to files that are not the cache's."""
    place = root
    for name in names:
        place = place / name
        if place.is_symlink():
            refuse(place, "folder")
    return place


def refuse(path: Path, kind: str = "file") -> None:
    """Raises the CacheError for what is no file, or folder, of its own."""
    raise CacheError(
        f"{path} is not a {kind} of its own: prift follows no links out of a cache. "
        "Put a copy in its place, or delete it."
    )


def is_file(status: os.stat_result) -> bool:
    """Whether `lstat` tells of a file: neither a link nor anything else."""
    return stat.S_ISREG(status.st_mode)


def read_small(file: Path, limit: int) -> bytes:
    """The first `limit` bytes of a file at most. Raises OSError, for links too."""
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as opened:
        return opened.read(limit)
