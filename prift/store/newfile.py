"""A file that appears whole or not at all, and knows the hash of its bytes."""

import contextlib
import hashlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

from prift.store.process import alive, signature

_DAY = 24 * 3600


class NewFile:
    """Written under a hidden name in `folder`, hashed on the way; `publish` gives it its name.

    Unbuffered, so that closing it cannot fail for want of room. A file object to pyarrow.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / f".{signature()}-{uuid.uuid4().hex[:8]}.tmp"
        self._raw = open(self._path, "xb", buffering=0)
        self._hash = hashlib.sha256()
        self.closed = self._abandoned = False

    def write(self, data: Any) -> int:
        """All of `data`; none of it once the file was abandoned."""
        rest = memoryview(data)
        while len(rest) and not self._abandoned:
            written = self._raw.write(rest)
            self._hash.update(rest[:written])
            rest = rest[written:]
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Ends writing."""
        self.closed = True
        self._raw.close()

    def sha256(self) -> str:
        """Hash of what was written so far, hex."""
        return self._hash.hexdigest()

    def publish(self, name: str) -> Path:
        """Makes the file durable and visible."""
        os.fsync(self._raw.fileno())
        self.close()
        os.replace(self._path, self._folder / name)
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)  # or a power cut may forget the name
        finally:
            os.close(handle)
        return self._folder / name

    def abandon(self) -> None:
        """Removes what was written; what is still written goes nowhere."""
        self._abandoned = True
        self._raw.close()
        with contextlib.suppress(OSError):  # where nothing may be written any more it stays
            self._path.unlink()


def remove_stale(folder: Path) -> None:
    """Removes what killed processes had begun here: at once where the process was one of this
    machine, after a day without a write where that cannot be told. Never a live writer's."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
            lives = alive(path.name[1:-4].rpartition("-")[0])
            if lives is False or (lives is None and time.time() - path.lstat().st_mtime > _DAY):
                path.unlink()
