"""Where a cache lies: a folder, or a URL of an object store with a folder of copies on this disk.

    for part in root.parts(prior):
        root.fetch(prior, part)          # a local file; parts never change, so it is kept
    root.publish(prior, new_file, name)  # visible whole or not at all

Knows names, bytes and hashes; knows no Parquet.
"""

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from prift.errors import CacheError
from prift.store.newfile import NewFile
from prift.store.nolinks import inside, is_file, read_small, refuse

IDENTITY = "prior.json"
MAX_IDENTITY = 1 << 16
"""Bytes of a prior.json; larger ones are none."""
MAX_PART = 1 << 32
"""Bytes of a part; larger ones are none, and not read: prift writes about 200 MB at most."""
_BLOCK = 1 << 23  # bytes copied at once
_MAX_NOTE = 1 << 10
CLAIMS = "claims"
"""Folder of notes on who works on what, so that few work on the same. Nothing depends on them."""
# window.i-of-n, and in the moment of its taking away a number more. Nothing else is deleted there.
_CLAIM = re.compile(r"[\w-]+\.\d+-of-\d+(\.[0-9a-f]{8})?")


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


class Root:
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

    def claim(self, prior: str, name: str, owner: str) -> bool:
        """Leaves a note that `owner` works on something; False where there is one already. Raises
        OSError."""
        note = self._note(prior, name)
        for last in (*[False] * 9, True):
            note.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if last:
                    raise
                continue  # another has just removed the folder, which was empty
            with open(handle, "w") as file:
                file.write(owner)
            return True
        raise AssertionError

    def claimant(self, prior: str, name: str) -> str | None:
        """Who left the note; "" while it is being written, None where there is none."""
        try:
            return read_small(self._note(prior, name), _MAX_NOTE).decode(errors="replace")
        except OSError:
            return None

    def claims(self, prior: str) -> dict[str, float]:
        """All notes: their names, and when they were written (Unix seconds)."""
        found = {}
        for path in inside(self.folder, prior, CLAIMS).glob("*"):
            with contextlib.suppress(OSError):
                status = path.lstat()
                if is_claim(path.name) and is_file(status):
                    found[path.name] = status.st_mtime
        return found

    def release(self, prior: str, name: str) -> None:
        """Takes a note away; one that is gone already is no error. Raises OSError."""
        note = self._note(prior, name)
        note.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others' notes, or parts, are there
            note.parent.rmdir()
            note.parent.parent.rmdir()

    def bury(self, prior: str, name: str, owner: str) -> bool:
        """Takes away the note of an owner who is dead; False where another has it by now. Raises
        OSError."""
        note = self._note(prior, name)
        # Of several that find it at once one has it under a name of its own, and looks again.
        aside = note.with_name(f"{name}.{uuid.uuid4().hex[:8]}")
        try:
            os.rename(note, aside)
        except FileNotFoundError:
            return False
        found = read_small(aside, _MAX_NOTE).decode(errors="replace")
        if found != owner:
            with contextlib.suppress(OSError):  # another's by now, or a disk without such links
                os.link(aside, note)
        aside.unlink(missing_ok=True)
        return found == owner

    def _note(self, prior: str, name: str) -> Path:
        if not is_claim(name):
            raise CacheError(f"{name!r} is not the name of a claim")
        return inside(self.folder, prior, CLAIMS) / name

    def remove_prior(self, prior: str) -> None:
        """Takes a prior away, prior.json first: a reader that comes now finds none. Raises
        OSError."""
        folder = inside(self.folder, prior)
        (folder / IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(folder)


def is_claim(name: str) -> bool:
    """Whether a file of this name in a prior's claims is one."""
    return bool(_CLAIM.fullmatch(name))


def digest_in(name: str) -> str:
    """The hash that a part's name promises: 32 hex digits, the first of its bytes' sha256."""
    return name.removesuffix(".parquet").rpartition("-")[2]


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
