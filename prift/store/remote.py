"""A cache in an object store: parts are downloaded once and kept, and uploaded whole.

root = open_root("s3://bucket/team/cache")
"""

import contextlib
import hashlib
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from prift.errors import CacheError
from prift.home import cache_home
from prift.store.newfile import NewFile
from prift.store.notes import CLAIMS, is_claim
from prift.store.parts import damaged
from prift.store.roots import (
    IDENTITY,
    MAX_IDENTITY,
    OpenPart,
    Part,
    Root,
    digest_of_file,
    promises,
    time_in,
    write_whole,
)
from prift.store.stores import Store

_KEPT_SECONDS = 24 * 3600.0  # copies of parts that are gone: others may still read them
_AT_ONCE = 16  # small requests


class RemoteRoot(Root):
    """A cache below a URL. See Root. Copies lie in <prift's cache home>/copies/<hash of the URL>;
    they may be deleted at any time."""

    def __init__(self, url: str):
        self._store = Store(url)
        place = f"{self._store.name}?{urlsplit(url).query}"
        place = hashlib.sha256(place.encode()).hexdigest()[:16]
        super().__init__(cache_home() / "copies" / place)
        self.name = self._store.name
        self.given = re.sub("(?<=://)[^/@]*@", "", url)

    def priors(self) -> list[str]:
        names = self._folders()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sizes = list(pool.map(lambda name: self._store.size(f"{name}/{IDENTITY}"), names))
        return [name for name, size in zip(names, sizes, strict=True) if size]

    def _folders(self) -> list[str]:
        return sorted(i.base_name for i in self._store.list() if i.type.name == "Directory")

    def identity(self, prior: str, fresh: bool = False) -> str:
        copy = self.folder / prior / IDENTITY
        # Named by the hash of what it holds, it never changes.
        if re.fullmatch("[0-9a-f]{16}", prior) and not fresh:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if digest_of_file(copy)[:16] == prior:
                    return copy.read_text(encoding="utf-8")
        place = f"{self.where(prior)}/{IDENTITY}"
        if (size := self._store.size(f"{prior}/{IDENTITY}")) > MAX_IDENTITY:
            raise CacheError(f"{place} is no prior's identity: {size:,} bytes")
        data = self._store.get(f"{prior}/{IDENTITY}")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise CacheError(f"{place} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest()[:16] == prior:
            with contextlib.suppress(OSError):  # it only saves a request
                self._make_private()
                copy.parent.mkdir(parents=True, exist_ok=True)
                write_whole(copy.parent, IDENTITY, data)
        return text

    def parts(self, prior: str) -> list[Part]:
        found = [
            Part(
                info.base_name,
                info.size,
                info.mtime.timestamp() if info.mtime else time_in(info.base_name),
            )
            for info in self._store.list(f"{prior}/parts")
            if info.is_file
            and info.base_name.endswith(".parquet")
            and not info.base_name.startswith(".")
        ]
        self._prune(prior, {part.name for part in found})
        return sorted(found, key=lambda part: part.name)

    def _prune(self, prior: str, listed: set[str]) -> None:
        """Takes away old copies of parts that the store has no more."""
        old = time.time() - _KEPT_SECONDS
        for copy in self.parts_folder(prior).glob("[!.]*.parquet"):
            with contextlib.suppress(OSError):
                if copy.name not in listed and copy.lstat().st_mtime < old:
                    copy.unlink()

    def fetch(self, prior: str, part: Part) -> Path:
        copy = self._place(prior, part)
        with contextlib.suppress(OSError):
            if copy.stat().st_size == part.size:
                return copy
        place = self.where(prior, part.name)
        try:
            self._make_private()
            file = self._store.download(f"{prior}/parts/{part.name}", copy.parent)
            if not promises(part.name, file.sha256()):
                file.abandon()
                raise damaged(place, "its content does not match the hash in its name")
            return file.publish(part.name)
        except OSError as error:
            raise CacheError(
                f"no room for a copy of {place} in {copy.parent}: {error.strerror}. "
                "XDG_CACHE_HOME says where copies lie."
            ) from error

    def forget(self, prior: str, name: str) -> bool:
        copy = self.parts_folder(prior) / name
        try:
            if not promises(name, digest_of_file(copy)):
                copy.unlink()
                return True
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False

    def source(self, prior: str, part: Part) -> OpenPart:
        self._place(prior, part)
        file = self._store.open(f"{prior}/parts/{part.name}")
        return OpenPart(file, part.name, self.where(prior, part.name))

    def content(self, prior: str, part: Part) -> bytes:
        self._place(prior, part)
        return self._store.get(f"{prior}/parts/{part.name}")

    def download(self, prior: str, part: Part, folder: Path) -> NewFile:
        self._place(prior, part)
        return self._store.download(f"{prior}/parts/{part.name}", folder)

    def _make_private(self) -> None:
        """The folder of the copies: others on this machine may have no right to the bucket."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def begin(self, prior: str, identity: str) -> None:
        self._make_private()
        self.parts_folder(prior).mkdir(parents=True, exist_ok=True)
        if not self._store.size(f"{prior}/{IDENTITY}"):
            self._store.put(f"{prior}/{IDENTITY}", identity.encode())

    def publish(self, prior: str, file: NewFile, name: str) -> Path:
        copy = file.publish(name)
        try:
            with pa.memory_map(str(copy)) as mapped:
                self._store.put(f"{prior}/parts/{name}", mapped.read_buffer())
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        return copy

    def remove(self, prior: str, name: str) -> None:
        super().remove(prior, name)
        self._store.delete(f"{prior}/parts/{name}")

    def remove_prior(self, prior: str) -> None:
        self._store.delete(f"{prior}/{IDENTITY}")
        for part in self.parts(prior):
            self.remove(prior, part.name)
        for info in self._notes(prior):
            self._store.delete(f"{prior}/{CLAIMS}/{info.base_name}")

    def claim(self, prior: str, name: str, owner: str) -> bool:
        """As Root's; of two that ask at the same moment both may get it."""
        if self.name.startswith("hf://"):
            return True  # each would be a commit
        if self._store.size(f"{prior}/{CLAIMS}/{name}"):
            return False
        self._store.put(f"{prior}/{CLAIMS}/{name}", owner.encode())
        return True

    def claimant(self, prior: str, name: str) -> str | None:
        try:
            if not self._store.size(f"{prior}/{CLAIMS}/{name}"):
                return None
            return self._store.get(f"{prior}/{CLAIMS}/{name}").decode(errors="replace")
        except CacheError:
            return None

    def claims(self, prior: str) -> dict[str, float]:
        listed = [info for info in self._notes(prior) if is_claim(info.base_name)]
        return {i.base_name: i.mtime.timestamp() if i.mtime else time.time() for i in listed}

    def _notes(self, prior: str) -> list[Any]:
        return [info for info in self._store.list(f"{prior}/{CLAIMS}") if info.is_file]

    def bury(self, prior: str, name: str, owner: str) -> bool:
        """As Root's; of several that ask at the same moment all may get it."""
        if self.claimant(prior, name) != owner:
            return False
        self.release(prior, name)
        return True

    def release(self, prior: str, name: str) -> None:
        self._store.delete(f"{prior}/{CLAIMS}/{name}")


def open_root(where: str | Path) -> Root:
    """The root at a path or a URL. Nothing is read or made. Raises CacheError for a URL that no
    file system is known for."""
    if "://" not in str(where):
        return Root(Path(where).expanduser())
    split = urlsplit(str(where))
    if split.scheme != "file":
        if not split.scheme or not split.netloc:
            raise CacheError(f"{where} names no store: write s3://bucket/path, for example.")
        return RemoteRoot(str(where))
    if split.netloc not in ("", "localhost") or not split.path:
        raise CacheError(f"{where} names no folder of this machine: write file:///path")
    return Root(Path(unquote(split.path)))
