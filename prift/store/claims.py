"""Which windows of the data other processes have in work, so that few score the same.

Claims are small files below the prior. They are advice: whoever ignores one does work twice and
no harm, and one that a killed process left behind stops nobody.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable

from prift.errors import CacheError
from prift.store.process import alive, signature
from prift.store.roots import Root

_DAY = 24 * 3600
_LOOK_SECONDS = 0.2
_UNSIGNED_SECONDS = 10.0
_PATIENCE = 600.0  # seconds: then a window is scored, whoever is at it


class Claims:
    """Claims of one process on the windows of its share; a context manager that gives back those
    it still has.

    share  'i/n': processes with other shares of the same n never meet

    Raises CacheError where the cache cannot be written.
    """

    def __init__(self, root: Root, prior: str, share: str = "0/1"):
        self._root, self._prior = root, prior
        self._scope = share.replace("/", "-of-")
        self._me = f"{signature()} {uuid.uuid4().hex[:8]}"
        self._mine: set[str] = set()
        self._asked = ""  # what `take` is about, which may be there and not in _mine yet

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_: object) -> None:
        self.release(list(self._mine))

    def take(self, window: str) -> bool:
        """Whether the window is this process's now: it was free, or its claimant is dead."""
        name = self._asked = self._name(window)
        try:
            if not self._root.claim(self._prior, name, self._me):
                claimant = self._root.claimant(self._prior, name)
                if self._lives(name, claimant) is not False:
                    return False
                if not self._root.bury(self._prior, name, claimant or ""):
                    return False  # another was faster
                if not self._root.claim(self._prior, name, self._me):
                    return False  # and so here
        except OSError as error:
            raise CacheError(
                f"cannot write to the cache {self._root.where(self._prior)}: "
                f"{error.strerror or error}. Finished parts are kept; once there is room and "
                "permission, run the same command again."
            ) from error
        else:
            self._mine.add(name)
            return True
        finally:
            self._asked = ""

    def release(self, names: Iterable[str]) -> None:
        """Gives back what `take` took of these: windows, or names of claims."""
        for name in map(self._name, names):
            if name in self._mine:
                with contextlib.suppress(OSError, CacheError):
                    self._root.release(self._prior, name)
                self._mine.discard(name)

    def company(self) -> bool:
        """Whether another process that may want the same windows holds any. Also takes away what
        is a day old. May run in a thread beside `take`."""
        found = self._root.claims(self._prior)
        asked = self._asked
        if asked in found and self._root.claimant(self._prior, asked) == self._me:
            del found[asked]
        for name, written in found.items():
            if name not in self._mine and time.time() - written > _DAY:
                with contextlib.suppress(OSError, CacheError):
                    self._root.release(self._prior, name)
        return any(name not in self._mine and self._meets(name) for name in found)

    def wait(self, window: str, say: Callable[[str], None] | None = None) -> None:
        """Until the window is free, or its claimant is dead or of another machine, about which
        nothing is known; ten minutes at most."""
        name, begun = self._name(window), time.monotonic()
        while time.monotonic() - begun < _PATIENCE:
            if not self._lives(name, self._root.claimant(self._prior, name)):
                return
            if say is not None:
                say(f"waiting for what process {self._pid(name)} of this machine has in work")
                say = None
            time.sleep(_LOOK_SECONDS)

    def take_late(self, window: str) -> bool:
        """`wait`, then `take`, and again where another was faster; False for a claimant of another
        machine, or after ten minutes."""
        name, begun = self._name(window), time.monotonic()
        while time.monotonic() - begun < _PATIENCE:
            self.wait(window)
            if self.take(window):
                return True
            claimant = self._root.claimant(self._prior, name)
            if claimant is not None and self._lives(name, claimant) is None:
                return False
        return False

    def _lives(self, name: str, claimant: str | None) -> bool | None:
        """Whether the claimant does; None where it is not of this machine, or there is none."""
        if claimant == "":  # it is about to sign, or was killed just before
            written = self._root.claims(self._prior).get(name, 0)
            return time.time() - written < _UNSIGNED_SECONDS
        return None if claimant is None else alive(claimant.partition(" ")[0])

    def _pid(self, name: str) -> str:
        claimant = self._root.claimant(self._prior, name) or "?"
        return claimant.rpartition("-")[0].rpartition("-")[2]

    def _name(self, window: str) -> str:
        return window if "." in window else f"{window}.{self._scope}"

    def _meets(self, name: str) -> bool:
        other, own = name.partition(".")[2].split("-of-"), self._scope.split("-of-")
        return other[-1:] != own[-1:] or other == own
