"""Arrays in files that the processes of one machine share: the first writes them, all map them.

    $TMPDIR/prift-<user id>/<key>/arrays/<name>.npy

A folder lives while a process holds a lock (flock) on it. The kernel lets go of a lock when its
process ends, however it ends, so no process id or age has to be guessed at: the last to let go
removes the folder, and what a killed run left is removed by the next run that starts.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from prift.errors import PriftError

_WHOLE = "arrays"  # renamed to this once all of them are written


class MappedArrays(Mapping[str, np.ndarray]):
    """Read-only arrays by name, mapped from the files of one folder.

    Pickled, it is the folder's path: a worker process, forked or not, maps the same files. It lives
    until `close`, until it is collected, or until the process ends.
    """

    def __init__(self, folder: Path, lock: int | None = None):
        self._folder = folder
        files = sorted((folder / _WHOLE).iterdir())
        # np.asarray: a slice of np.memmap itself costs ten times that of an array over it
        self._arrays = {f.stem: np.asarray(np.load(f, mmap_mode="r")) for f in files}
        self.close = weakref.finalize(self, _let_go, folder, lock, os.getpid())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self):
        return MappedArrays, (self._folder,)


def mapped_arrays(key: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> MappedArrays:
    """The arrays that `compute` gives for this key, one copy on the machine.

    The first process that asks computes and writes them; others that ask meanwhile wait, and map
    what it wrote. Raises PriftError where there is no room for them, and whatever compute raises.
    """
    root = Path(tempfile.gettempdir()) / f"prift-{os.getuid()}"
    with _telling(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # they tell of the data's text
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise PermissionError(0, "it is somebody else's")
        _remove_dead(root, key)
    while True:
        with _telling(root):
            lock = _opened(root / key)
        try:
            if lock is not None and _ready(root / key, lock, compute):
                return MappedArrays(root / key, lock)
        except BaseException:
            os.close(lock)
            raise
        if lock is not None:
            os.close(lock)


def _ready(folder: Path, lock: int, compute: Callable[[], Mapping[str, np.ndarray]]) -> bool:
    """Whether the folder is whole and held; False where another process just removed it."""
    with _telling(folder.parent):
        alone = _alone(lock)
    if alone and _is_at(folder, lock):  # new, or left by a run that was killed
        try:
            arrays = compute()
            with _telling(folder.parent):
                _write(folder, arrays)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    with _telling(folder.parent):
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for the one that writes
    # Going from the one lock to the other lets go for a moment, in which others may have come.
    return _is_at(folder, lock) and (folder / _WHOLE).is_dir()


def _write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for left in folder.iterdir():
        shutil.rmtree(left)
    new = folder / "new"
    new.mkdir()
    for name, array in arrays.items():
        np.save(new / f"{name}.npy", array)
    new.rename(folder / _WHOLE)


def _opened(folder: Path) -> int | None:
    """A descriptor of the folder, made where it is not; None where it was removed meanwhile."""
    folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        return os.open(folder, os.O_RDONLY)
    return None


def _alone(lock: int) -> bool:
    """Takes the folder for itself, where no other process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(folder: Path, lock: int) -> bool:
    """Whether the folder that was opened is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder))
    except FileNotFoundError:
        return False


def _remove_dead(root: Path, key: str) -> None:
    """Removes what killed runs left, but for the folder that is wanted."""
    for folder in root.iterdir():
        if folder.name != key:
            with contextlib.suppress(FileNotFoundError):
                _let_go(folder, os.open(folder, os.O_RDONLY), os.getpid())


def _let_go(folder: Path, lock: int | None, owner: int) -> None:
    """Gives the lock back, and removes the folder if no other process holds it."""
    if lock is None or os.getpid() != owner:  # a forked worker shares its parent's lock
        return
    if _alone(lock) and _is_at(folder, lock):
        shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


@contextlib.contextmanager
def _telling(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PriftError(
            f"the statistics cannot be decoded into {root}: {error.strerror or error}. Point the "
            "environment variable TMPDIR at a folder of a local disk with room for them."
        ) from error
