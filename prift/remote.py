"""A cache in an object store: parts are downloaded once and kept, and uploaded in one piece.

    root = open_root("s3://bucket/team/cache")

S3 and Google's store through pyarrow, anything else through fsspec (hf:// with huggingface_hub).
What fails is tried again a few times; then it is an error, and nothing half-written is visible.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prift.errors import CacheError
from prift.home import cache_home
from prift.newfile import NewFile
from prift.roots import IDENTITY, OpenPart, Part, Root, digest_in, digest_of, write_whole

T = TypeVar("T")

_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds before the further tries
_HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)


class RemoteRoot(Root):
    """A cache below a URL. See Root. Copies lie in <prift's cache home>/copies/<hash of the URL>;
    they may be deleted at any time."""

    def __init__(self, url: str):
        split = urlsplit(url)
        bare = f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}".rstrip("/")
        place = hashlib.sha256(f"{bare}?{split.query}".encode()).hexdigest()[:16]
        super().__init__(cache_home() / "copies" / place)
        self.name = bare
        self._store, self._path = _file_system(url, bare)

    def priors(self) -> list[str]:
        return sorted(
            info.base_name
            for info in self._list(self._path)
            if info.type.name == "Directory" and self._info(info.base_name, IDENTITY).size
        )

    def identity(self, prior: str) -> str:
        try:
            return self._get(prior, IDENTITY).decode()
        except UnicodeDecodeError as error:
            raise CacheError(f"{self.where(prior)}/{IDENTITY} cannot be read: {error}") from error

    def parts(self, prior: str) -> list[Part]:
        found = [
            Part(info.base_name, info.size, info.mtime.timestamp() if info.mtime else 0.0)
            for info in self._list(f"{self._path}/{prior}/parts")
            if info.is_file
            and info.base_name.endswith(".parquet")
            and not info.base_name.startswith(".")
        ]
        return sorted(found, key=lambda part: part.name)

    def fetch(self, prior: str, part: Part) -> Path:
        copy = super().fetch(prior, part)
        try:
            if copy.stat().st_size == part.size:
                return copy
        except OSError:
            pass
        data = self._get(prior, "parts", part.name)
        if digest_of(data) != digest_in(part.name):
            raise CacheError(
                f"{self.where(prior, part.name)} is damaged: its content does not match the hash "
                "in its name. Delete it and run the same `prift precompute` command again; only "
                "its rows are scored anew."
            )
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            return write_whole(copy.parent, part.name, data)
        except OSError as error:
            raise CacheError(
                f"no room for a copy of {self.where(prior, part.name)} in {copy.parent}: "
                f"{error.strerror}. XDG_CACHE_HOME says where copies lie."
            ) from error

    def source(self, prior: str, part: Part) -> OpenPart:
        path = f"{self._path}/{prior}/parts/{part.name}"
        file = self._tried(lambda: self._store.open_input_file(path))
        return OpenPart(file, part.name, self.where(prior, part.name))

    def content(self, prior: str, part: Part) -> bytes:
        return self._get(prior, "parts", part.name)

    def begin(self, prior: str, identity: str) -> None:
        self.parts_folder(prior).mkdir(parents=True, exist_ok=True)
        if not self._info(prior, IDENTITY).size:
            self._put(identity.encode(), prior, IDENTITY)

    def publish(self, prior: str, file: NewFile, name: str) -> Path:
        copy = file.publish(name)
        try:
            self._put(copy.read_bytes(), prior, "parts", name)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        return copy

    def remove(self, prior: str, name: str) -> None:
        super().remove(prior, name)
        self._delete(prior, "parts", name)

    def remove_prior(self, prior: str) -> None:
        self._delete(prior, IDENTITY)
        for part in self.parts(prior):
            self.remove(prior, part.name)

    def _info(self, *names: str) -> Any:
        path = "/".join([self._path, *names])
        return self._tried(lambda: self._store.get_file_info(path))

    def _list(self, path: str) -> list[Any]:
        from pyarrow.fs import FileSelector

        chosen = FileSelector(path, allow_not_found=True)
        return self._tried(lambda: self._store.get_file_info(chosen))

    def _get(self, *names: str) -> bytes:
        path = "/".join([self._path, *names])

        def get() -> bytes:
            with self._store.open_input_file(path) as file:
                return file.read()

        return self._tried(get)

    def _put(self, data: bytes, *names: str) -> None:
        path = "/".join([self._path, *names])

        def put() -> None:
            with self._store.open_output_stream(path) as file:
                file.write(data)
            if (found := self._store.get_file_info(path).size) != len(data):
                raise OSError(f"{found} bytes arrived of {len(data)}")

        self._tried(put)

    def _delete(self, *names: str) -> None:
        path = "/".join([self._path, *names])

        def delete() -> None:
            if self._store.get_file_info(path).is_file:
                self._store.delete_file(path)

        self._tried(delete)

    def _tried(self, ask: Callable[[], T]) -> T:
        """The answer, after several tries where it takes them. Raises CacheError."""
        for pause in (*_PAUSES, None):
            try:
                return ask()
            except _HOPELESS as error:
                raise CacheError(f"{self.name}: {error}") from error
            except OSError as error:
                if pause is None:
                    raise CacheError(
                        f"{self.name} does not answer ({len(_PAUSES) + 1} tries): {error}. What "
                        "was finished is kept; run the same command again."
                    ) from error
                time.sleep(pause)
        raise AssertionError


def open_root(where: str | Path) -> Root:
    """The root at a path or a URL. Nothing is read or made. Raises CacheError for a URL that no
    file system is known for."""
    scheme, _, rest = str(where).partition("://")
    if not rest:
        return Root(Path(where).expanduser())
    if scheme == "file":
        return Root(Path(urlsplit(str(where)).path))
    return RemoteRoot(str(where))


def _file_system(url: str, bare: str) -> tuple[Any, str]:
    """(pyarrow file system, path in it). Raises CacheError."""
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        if url.startswith(("s3://", "gs://", "gcs://")):
            store, path = FileSystem.from_uri(url)
        else:
            import fsspec

            inner, path = fsspec.url_to_fs(url)
            store = PyFileSystem(FSSpecHandler(inner))
    except (ValueError, ImportError, OSError) as error:
        raise CacheError(
            f"--cache {bare}: {error}. Wanted a folder, or a URL s3://, gs://, hf:// or file://."
        ) from error
    return store, path.rstrip("/")
