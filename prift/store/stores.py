"""An object store at a URL: list, read, write and delete, each tried again where it fails.

S3 and Google's store through pyarrow, others through fsspec (hf:// with huggingface_hub, az://
with adlfs).
Ours are the only further tries: six of them, which in S3 take a minute where nothing answers
(measured: reading 28 s, writing 63 s).
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from prift.errors import CacheError, OptionError, first_line
from prift.store.newfile import NewFile

T = TypeVar("T")

_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds before the further tries
_PIECE = 1 << 22  # bytes of a download that are held at a time
_THROUGH_FSSPEC = ("hf", "abfs", "abfss", "az", "memory")
"""Stores whose objects appear whole or not at all. What writes in place (sftp, smb, ftp) would show
parts half-written, and is none."""
_HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
# What S3 says that another try cannot change; pyarrow makes OSErrors of it.
_REFUSED = re.compile(
    "AWS Error (ACCESS_DENIED|NO_SUCH_|RESOURCE_NOT_FOUND|INVALID_|EXPIRED_|SIGNATURE_|"
    "UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION|OPT_IN_REQUIRED)"
)


class Store:
    """The objects below a URL. Paths are relative to it.

    name  the URL without options
    Raises OptionError for a URL with credentials in it, CacheError otherwise; where it says that
    the store does not answer, nothing half-written is there.
    """

    def __init__(self, url: str):
        split = urlsplit(url)
        self.name = f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}".rstrip("/")
        if split.password:
            raise OptionError(
                f"{self.name}: leave credentials out of the URL, which goes into logs and output "
                "folders. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; other "
                "stores have variables of their own."
            )
        try:
            self._files, self._path, self._look_again = _file_system(url)
        except (ValueError, ImportError, OSError) as error:
            raise CacheError(
                f"{self.name}: {first_line(error)}. "
                "Wanted a folder, or a URL s3://, gs://, hf://, az://, abfs:// or file://."
            ) from error

    def list(self, path: str = "") -> list[Any]:
        """pyarrow.fs.FileInfo of what lies directly below; nothing where there is nothing."""
        from pyarrow.fs import FileSelector

        chosen = FileSelector(self._at(path), allow_not_found=True)

        def ask() -> list[Any]:
            self._look_again()
            return self._files.get_file_info(chosen)

        return self._tried(ask)

    def size(self, path: str) -> int:
        """Bytes of an object; 0 where there is none."""

        def ask() -> int:
            self._look_again()
            return self._files.get_file_info(self._at(path)).size or 0

        return self._tried(ask)

    def open(self, path: str) -> IO[bytes]:
        """An object to read a little of."""
        return self._tried(lambda: self._files.open_input_file(self._at(path)))

    def get(self, path: str) -> bytes:
        """The whole object."""

        def ask() -> bytes:
            with self._files.open_input_file(self._at(path)) as file:
                return file.read()

        return self._tried(ask)

    def download(self, path: str, folder: Path) -> NewFile:
        """The whole object as a file begun in `folder`, which is made. Raises OSError where this
        disk refuses."""

        def ask() -> NewFile | _Refused:
            with self._files.open_input_file(self._at(path)) as source:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    file = NewFile(folder)
                except OSError as error:
                    return _Refused(error)
                with _abandoning(file):
                    while piece := source.read(_PIECE):
                        try:
                            file.write(piece)
                        except OSError as error:
                            file.abandon()
                            return _Refused(error)
                return file

        found = self._tried(ask)
        if isinstance(found, _Refused):
            raise found.error
        return found

    def put(self, path: str, data: Any) -> None:
        """An object with these bytes (a buffer): visible whole or not at all."""
        at = self._at(path)

        def ask() -> None:
            try:
                with self._files.open_output_stream(at) as file:
                    file.write(data)
                arrived = self._files.get_file_info(at).size
                if arrived != len(data):
                    raise OSError(f"{arrived} bytes arrived of {len(data)}")
            except OSError:
                self._drop_other(at, len(data))
                raise

        # In a thread, which no interrupt ends between opening and writing: leaving the block
        # publishes what was written so far.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._tried, ask).result()

    def _drop_other(self, at: str, size: int) -> None:
        """Takes away what a failed write left, where the store has let it through."""
        with contextlib.suppress(OSError):
            self._look_again()
            found = self._files.get_file_info(at)
            if found.is_file and found.size != size:
                self._files.delete_file(at)

    def delete(self, path: str) -> None:
        """Takes an object away, if it is there."""

        def ask() -> None:
            self._look_again()
            if self._files.get_file_info(self._at(path)).is_file:
                self._files.delete_file(self._at(path))

        self._tried(ask)

    def _at(self, path: str) -> str:
        return f"{self._path}/{path}".rstrip("/")

    def _tried(self, ask: Callable[[], T]) -> T:
        """The answer, after several tries where it takes them."""
        for pause in (*_PAUSES, None):
            try:
                return ask()
            except OSError as error:
                if isinstance(error, _HOPELESS) or _REFUSED.search(str(error)):
                    raise CacheError(f"{self.name}: {first_line(error)}") from error
                if pause is None:
                    raise CacheError(
                        f"{self.name} does not answer ({len(_PAUSES) + 1} tries): "
                        f"{first_line(error)}. What was finished is kept; run the same command "
                        "again."
                    ) from error
                time.sleep(pause)
        raise AssertionError


class _Refused:
    """This disk's error, which another request to the store does not mend."""

    def __init__(self, error: OSError):
        self.error = error


@contextlib.contextmanager
def _abandoning(file: NewFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.abandon()
        raise


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Clients of stores raise what they like (httpx's errors, botocore's): makes OSErrors of it."""
    try:
        yield
    except (OSError, ImportError, NotImplementedError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


class _OSErrors:
    """A file system of fsspec's, or a file of one, that raises OSErrors."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*args: Any, **options: Any) -> Any:
            with _os_errors():
                found = value(*args, **options)
            return _OSErrors(found) if name == "open" else found

        return call


def _file_system(url: str) -> tuple[Any, str, Callable[[], None]]:
    from pyarrow import fs

    if url.startswith(("gs://", "gcs://")):
        store, path = fs.FileSystem.from_uri(url)
        again = {"retry_time_limit": timedelta(seconds=5)}
    elif url.startswith("s3://"):
        store, path = fs.FileSystem.from_uri(url)
        # An object of less than 10 MB is one request then, and larger ones are whole or absent.
        again = {
            "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=1),
            "allow_delayed_open": True,
        }
    else:
        import fsspec

        if (scheme := urlsplit(url).scheme) not in _THROUGH_FSSPEC:
            raise ValueError(
                f"{scheme}:// is no store that prift knows to show files whole or not at all"
            )
        with _os_errors():
            inner, path = fsspec.url_to_fs(url)
        inner = _OSErrors(inner)
        store = fs.PyFileSystem(fs.FSSpecHandler(inner))
        return store, path.rstrip("/"), inner.invalidate_cache
    # What a URL cannot say: the same file system, with fewer tries of its own.
    _, (options,) = store.__reduce__()
    return type(store)(**{**options, **again}), path.rstrip("/"), lambda: None
