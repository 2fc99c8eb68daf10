"""Notes in a cache's folder on who works on what, for claims.py."""

import contextlib
import os
import re
import uuid
from pathlib import Path

from prift.errors import CacheError
from prift.store.nolinks import inside, is_file, read_small

_MAX_NOTE = 1 << 10  # bytes
CLAIMS = "claims"
"""Folder of notes on who works on what, so that few work on the same. Nothing depends on them."""
# window.i-of-n, and in the moment of its taking away a number more. Nothing else is deleted there.
_CLAIM = re.compile(r"[\w-]+\.\d+-of-\d+(\.[0-9a-f]{8})?")


class Notes:
    """What a Root has of them. A note's name is <window>.<i>-of-<n>.

    folder  the cache's
    """

    folder: Path

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


def is_claim(name: str) -> bool:
    """Whether a file of this name in a prior's claims is one."""
    return bool(_CLAIM.fullmatch(name))
