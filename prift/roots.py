"""Where a cache lies: a folder, or a URL of an object store with a folder of copies on this disk.

    for part in root.parts(prior):
        root.fetch(prior, part)          # a local file; parts never change, so it is kept
    root.publish(prior, new_file, name)  # visible whole or not at all

Knows names, bytes and hashes; knows no Parquet.
"""

import contextlib
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prift.errors import CacheError
from prift.newfile import NewFile

IDENTITY = "prior.json"


class OpenPart:
    """A part that is read where it is, for `prift.parts`: a file with the name of the part's."""

    def __init__(self, file: IO[bytes], name: str, where: str):
        self.name, self._where, self._file = name, where, file
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close

    @property
    def closed(self) -> bool:
        return self._file.closed

    def __str__(self) -> str:
        return self._where


@dataclass(frozen=True, slots=True)
class Part:
    """A file below a prior's parts/: its name, bytes, and when it was written (Unix seconds)."""

    name: str
    size: int
    written: float


class Root:
    """A cache in a folder.

    name    what to call it in messages: no credentials
    folder  where its files, or the copies of them, lie on this disk

    Methods take a prior's id. Raise CacheError where a file or the store refuses.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)

    def where(self, prior: str, name: str = "") -> str:
        """What to call a prior, or one of its parts, in messages."""
        return "/".join([self.name, prior, *(["parts", name] if name else [])])

    def parts_folder(self, prior: str) -> Path:
        """Where its parts, or the copies of them, lie on this disk; new ones are begun there."""
        return self.folder / prior / "parts"

    def priors(self) -> list[str]:
        """Ids of all priors, ascending; an absent root holds none."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{IDENTITY}"))

    def identity(self, prior: str) -> str:
        """The text of its prior.json. Raises CacheError where there is none."""
        file = self.folder / prior / IDENTITY
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CacheError(f"{file} cannot be read: {error}") from error

    def parts(self, prior: str) -> list[Part]:
        """Its parts by name, ascending; none where the prior is absent."""
        found = []
        for path in sorted(self.parts_folder(prior).glob("[!.]*.parquet")):
            with contextlib.suppress(FileNotFoundError):  # taken away just now
                status = path.stat()
                found.append(Part(path.name, status.st_size, status.st_mtime))
        return found

    def fetch(self, prior: str, part: Part) -> Path:
        """A local file with the part's bytes."""
        return self.parts_folder(prior) / part.name

    def source(self, prior: str, part: Part) -> "Path | OpenPart":
        """What `prift.parts` reads a little of the part from; nothing is copied."""
        return self.parts_folder(prior) / part.name

    def content(self, prior: str, part: Part) -> bytes:
        """The part's bytes as they lie in the cache, whatever a copy of them says."""
        try:
            return (self.parts_folder(prior) / part.name).read_bytes()
        except OSError as error:
            raise CacheError(
                f"cannot read {self.where(prior, part.name)}: {error.strerror}"
            ) from error

    def begin(self, prior: str, identity: str) -> None:
        """Makes the prior's folder and its prior.json where they are absent. Raises OSError."""
        self.parts_folder(prior).mkdir(parents=True, exist_ok=True)
        if not (self.folder / prior / IDENTITY).exists():
            write_whole(self.folder / prior, IDENTITY, identity.encode())

    def publish(self, prior: str, file: NewFile, name: str) -> Path:
        """Makes a file begun in `parts_folder` visible under this name; its local path. Raises
        OSError."""
        return file.publish(name)

    def remove(self, prior: str, name: str) -> None:
        """Takes a part away; one that is gone already is no error. Raises OSError."""
        (self.parts_folder(prior) / name).unlink(missing_ok=True)

    def remove_prior(self, prior: str) -> None:
        """Takes a prior away, prior.json first: a reader that comes now finds none. Raises
        OSError."""
        (self.folder / prior / IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(self.folder / prior)


def digest_in(name: str) -> str:
    """The hash that a part's name promises: 32 hex digits, the first of its bytes' sha256."""
    return name.removesuffix(".parquet").rpartition("-")[2]


def digest_of(data: bytes) -> str:
    """What `digest_in` the name of a part with these bytes is."""
    return hashlib.sha256(data).hexdigest()[:32]


def write_whole(folder: Path, name: str, data: bytes) -> Path:
    """A file that appears with all its bytes or not at all. Raises OSError."""
    file = NewFile(folder)
    try:
        file.write(data)
        return file.publish(name)
    except BaseException:
        file.abandon()
        raise
