"""Scored positions of a sequence as half-open runs: begin, end, begin, end, ... (int32).

Runs are sorted and do not touch; positions are >= 1, since position 0 follows nothing.
"""

import numpy as np


def spans_of(mask: np.ndarray) -> np.ndarray:
    """Runs of the true entries of a bool mask [T]; int32 [2 * runs]."""
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges).astype(np.int32)


def positions_of(spans: np.ndarray) -> np.ndarray:
    """The positions that the runs cover, in order; int64."""
    runs = [np.arange(a, b) for a, b in zip(spans[::2], spans[1::2], strict=True)]
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


def count(spans: np.ndarray) -> int:
    """How many positions the runs cover."""
    return int((spans[1::2] - spans[::2]).sum())


def valid(spans: np.ndarray, length: int) -> bool:
    """Whether these are sorted runs, none empty or touching the next, within 1..length - 1."""
    steps = np.diff(spans)
    return bool(
        len(spans) % 2 == 0 and (steps > 0).all() and (not len(spans) or 1 <= spans[0])
    ) and (not len(spans) or int(spans[-1]) <= length)


def find(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray | None:
    """Index of each wanted position among the stored ones; None where one is not stored."""
    have, want = positions_of(stored), positions_of(wanted)
    index = np.searchsorted(have, want)
    if len(want) and (index[-1] >= len(have) or not np.array_equal(have[index], want)):
        return None
    return index
