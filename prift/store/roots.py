"""Where a cache lies: a folder, or a URL of an object store with a folder of copies on this disk.

    for part in root.parts(prior):
        root.fetch(prior, part)          # a local file; parts never change, so it is kept
    root.publish(prior, new_file, name)  # visible whole or not at all

Knows names, bytes and hashes; knows no Parquet.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from prift.errors import CacheError
from prift.store.newfile import NewFile
from prift.store.nolinks import inside, is_file, read_small, refuse
from prift.store.notes import Notes

IDENTITY = "prior.json"
MAX_IDENTITY = 1 << 16
"""Bytes of a prior.json; larger ones are none."""
MAX_PART = 1 << 32
"""Bytes of a part; larger ones are none, and not read: prift writes about 200 MB at most."""
_BLOCK = 1 << 23  # bytes copied at once


class OpenPart:
    """A part that is read where it is, for store.parts: a file with the name of the part's."""

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
    """A file below a prior's parts/: its name, bytes, and when it was written (Unix seconds; 0
    where nobody knows)."""

    name: str
    size: int
    written: float


class Root(Notes):
    """A cache in a folder.

    name    what to call it in messages: no credentials
    given   what names it in a command: `name`, with what a URL says of how to get there
    folder  where its files, or the copies of them, lie on this disk

    Methods take a prior's id. Raise CacheError where a file or the store refuses, and for a prior's
    folder, or one in it, that is a link.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)
        self.given = self.name

    def where(self, prior: str, name: str = "") -> str:
        """What to call a prior, or one of its parts, in messages."""
        return "/".join([self.name, prior, *(["parts", name] if name else [])])

    def parts_folder(self, prior: str) -> Path:
        """Where its parts, or the copies of them, lie on this disk; new ones are begun there."""
        return inside(self.folder, prior, "parts")

    def priors(self) -> list[str]:
        """Ids of all priors, ascending; an absent root holds none."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{IDENTITY}"))

    def nameless(self) -> list[str]:
        """Folders with parts that are no prior, since they have no prior.json: no reader looks at
        them."""
        priors = set(self.priors())
        return [name for name in self._folders() if name not in priors and self.parts(name)]

    def _folders(self) -> list[str]:
        """Names of all folders, ascending."""
        return sorted(path.parent.name for path in self.folder.glob("*/parts"))

    def identity(self, prior: str, fresh: bool = False) -> str:
        """The text of its prior.json, with `fresh` whatever a copy says. Raises CacheError where
        there is none."""
        file = inside(self.folder, prior) / IDENTITY
        try:
            data = read_small(file, MAX_IDENTITY + 1)
            if len(data) > MAX_IDENTITY:
                raise CacheError(f"{file} is no prior's identity: it is too large")
            return data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CacheError(f"{file} cannot be read: {error}") from error

    def parts(self, prior: str) -> list[Part]:
        """Its parts by name, ascending; none where the prior is absent."""
        found = []
        for path in sorted(self.parts_folder(prior).glob("[!.]*.parquet")):
            with contextlib.suppress(FileNotFoundError):  # taken away just now
                status = path.lstat()
                if not is_file(status):
                    refuse(path)
                found.append(Part(path.name, status.st_size, status.st_mtime))
        return found

    def fetch(self, prior: str, part: Part) -> Path:
        """A local file with the part's bytes."""
        return self._place(prior, part)

    def forget(self, prior: str, name: str) -> bool:
        """Whether the file that `fetch` gave was a copy that is damaged or gone, which the next
        `fetch` makes anew."""
        return False

    def source(self, prior: str, part: Part) -> "Path | OpenPart":
        """What `prift.store.parts` reads a little of the part from; nothing is copied."""
        return self._place(prior, part)

    def content(self, prior: str, part: Part) -> bytes:
        """The part's bytes as they lie in the cache, whatever a copy of them says."""
        try:
            return self._place(prior, part).read_bytes()
        except OSError as error:
            raise CacheError(
                f"cannot read {self.where(prior, part.name)}: {error.strerror}"
            ) from error

    def download(self, prior: str, part: Part, folder: Path) -> NewFile:
        """The part's bytes as they lie in the cache, in a new file of `folder`, which is made where
        it is absent. Nothing is visible there yet. Raises CacheError for what cannot be read,
        OSError for what cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        file = NewFile(folder)
        try:
            for block in self._blocks(prior, part):
                file.write(block)
        except BaseException:
            file.abandon()
            raise
        return file

    def _blocks(self, prior: str, part: Part) -> Iterator[bytes]:
        try:
            with open(self._place(prior, part), "rb") as source:
                while block := source.read(_BLOCK):
                    yield block
        except OSError as error:
            raise CacheError(
                f"cannot read {self.where(prior, part.name)}: {error.strerror}"
            ) from error

    def _place(self, prior: str, part: Part) -> Path:
        """Where a part that may be read, or the copy of it, lies. Raises CacheError."""
        if part.size > MAX_PART:
            raise CacheError(
                f"{self.where(prior, part.name)} is too large for a part of a cache: {part.size:,} "
                f"bytes, more than {MAX_PART:,}. Delete it; prift writes none of this size."
            )
        return self.parts_folder(prior) / part.name

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
        folder = inside(self.folder, prior)
        (folder / IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(folder)


def digest_in(name: str) -> str:
    """The hash that a part's name promises: 32 hex digits, the first of its bytes' sha256."""
    return name.removesuffix(".parquet").rpartition("-")[2]


def promises(name: str, sha256: str) -> bool:
    """Whether a part of this name has bytes of this sha256, hex."""
    return sha256[:32] == digest_in(name)


def digest_of_file(path: Path) -> str:
    """sha256 of a file, hex; a part's name ends in its beginning. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def time_in(name: str) -> float:
    """When a part was finished, as its name says it (Unix seconds); 0 where it does not."""
    try:
        stamp = datetime.strptime(name.partition("-")[0], "%Y%m%dT%H%M%SZ")
    except ValueError:
        return 0.0
    return stamp.replace(tzinfo=UTC).timestamp()


def write_whole(folder: Path, name: str, data: bytes) -> Path:
    """A file that appears with all its bytes or not at all. Raises OSError."""
    file = NewFile(folder)
    try:
        file.write(data)
        return file.publish(name)
    except BaseException:
        file.abandon()
        raise
