"""Writes rows into a cache, part by part; needs no lock and never leaves half a part visible."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from prift.errors import CacheError
from prift.identity import PriorIdentity
from prift.parts import PartWriter

_MAX_PART_TOKENS = 1 << 22


class CacheWriter:
    """Adds rows to the cache of one prior; a context manager.

    root, identity  the cache; its folders and prior.json are made where they are absent
    provenance      what explains the numbers: strings for each part's metadata
    part_seconds    a part becomes visible after this long or four million tokens, so this is
                    how much work a kill may lose

    On leaving, by an exception too, the rows added so far are kept: each of them is whole.
    Raises CacheError where the disk refuses.
    """

    def __init__(
        self,
        root: str | Path,
        identity: PriorIdentity,
        provenance: dict[str, str],
        part_seconds: float = 60.0,
    ):
        folder = Path(root).expanduser() / identity.id
        self._folder = folder / "parts"
        self._provenance, self._seconds = provenance, part_seconds
        self._part: PartWriter | None = None
        with self._guard():
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "prior.json").exists():
                beside = folder / f".prior-{os.getpid()}.tmp"
                beside.write_text(identity.json())
                os.replace(beside, folder / "prior.json")

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.flush()

    def add(self, key: bytes, length: int, spans: np.ndarray, stats: dict[str, Any]) -> None:
        """One sequence of `length` tokens: the spans scored, one array per statistic."""
        with self._guard():
            if self._part is None:
                self._part = PartWriter(self._folder, tuple(stats), self._provenance)
            self._part.add(key, length, spans, stats)
        old = time.monotonic() - self._part.started > self._seconds
        if old or self._part.tokens >= _MAX_PART_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Finishes the part being written, if there is one."""
        if self._part is not None:
            with self._guard():
                self._part.finish()
                self._part = None

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turns a refused write into a CacheError, and removes the part that it broke."""
        try:
            yield
        except OSError as error:
            part, self._part = self._part, None
            if part is not None:
                part.abandon()
            raise CacheError(
                f"cannot write to the cache {self._folder}: {error.strerror or error}. Finished "
                "parts are kept; once there is room and permission, run the same command again."
            ) from error
