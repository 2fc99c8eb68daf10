"""Scored positions of a sequence as half-open runs: begin, end, begin, end, ... (int32).

Runs are sorted and do not touch; positions are >= 1, since position 0 follows nothing. Many rows
of runs are one flat array and, for each row, how many of its entries are the row's.
"""

import itertools
from collections.abc import Sequence

import numpy as np


def spans_of(mask: np.ndarray) -> np.ndarray:
    """Runs of the true entries of a bool mask [T]; int32 [2 * runs]."""
    padded = np.zeros(len(mask) + 2, bool)
    padded[1:-1] = mask
    return np.flatnonzero(padded[1:] != padded[:-1]).astype(np.int32)


def positions_of(spans: np.ndarray) -> np.ndarray:
    """The positions that the runs cover, in order; int64."""
    runs = [np.arange(a, b) for a, b in zip(spans[::2], spans[1::2], strict=True)]
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


def count(spans: np.ndarray) -> int:
    """How many positions the runs cover."""
    return int((spans[1::2] - spans[::2]).sum())


def union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Runs of the positions that either covers."""
    mask = np.zeros(max([0, *a[-1:].tolist(), *b[-1:].tolist()]), bool)
    mask[positions_of(a)] = True
    mask[positions_of(b)] = True
    return spans_of(mask)


def flat(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of runs as one int32 array, and int64 [R], how many entries each has."""
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.concatenate([np.zeros(0, np.int32), *rows]), counts


def valid(spans: np.ndarray, length: int) -> bool:
    """Whether these are sorted runs, none empty or touching the next, within 1..length - 1."""
    edges = [0, *spans.tolist()]
    growing = all(a < b for a, b in itertools.pairwise(edges))
    return len(edges) % 2 == 1 and growing and edges[-1] <= length


def all_valid(flat: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> bool:
    """`valid` of a million rows at once; lengths: tokens of each row's sequence."""
    if (counts % 2).any():
        return False
    step = np.diff(flat.astype(np.int64), prepend=0)  # int32 differences would wrap around
    filled = counts > 0
    last = np.cumsum(counts)[filled] - 1
    first = last + 1 - counts[filled]
    step[first] = flat[first]
    return bool((step > 0).all() and (flat[last] <= lengths[filled]).all())


def cover(
    stored: np.ndarray, stored_counts: np.ndarray, wanted: np.ndarray, wanted_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted row lies in the stored row beside it.

    Returns bool [R], whether all that the row wants is stored; and int64 [wanted runs], the index
    of each wanted run's first position among its stored row's positions (no meaning if absent).
    """
    stored_row, wanted_row = _row_of_runs(stored_counts), _row_of_runs(wanted_counts)
    stored, wanted = stored.astype(np.int64), wanted.astype(np.int64)
    begin, end = stored[::2], stored[1::2]
    if not len(begin):
        return wanted_counts == 0, np.zeros(len(wanted_row), np.int64)
    # Runs do not touch, so a wanted run lies within one stored run: the last that begins by then.
    at = np.searchsorted((stored_row << 32) + begin, (wanted_row << 32) + wanted[::2], "right") - 1
    inside = (at >= 0) & (stored_row[at] == wanted_row) & (wanted[1::2] <= end[at])
    covered = np.ones(len(wanted_counts), bool)
    covered[wanted_row[~inside]] = False
    before = np.cumsum(end - begin) - (end - begin)
    first = np.searchsorted(stored_row, stored_row[at])
    return covered, before[at] - before[first] + wanted[::2] - begin[at]


def joined(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Indices begin, begin + 1, ... of each stretch, one stretch after the other; int64."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - ends + sizes, sizes)


def _row_of_runs(counts: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts // 2)


class Copy:
    """Where each wanted run comes from and goes to.

    offsets       of each wanted run within its row's values
    flat, counts  the wanted runs, row by row
    """

    def __init__(self, offsets: np.ndarray, flat: np.ndarray, counts: np.ndarray):
        self._offsets, self._runs = offsets, counts // 2
        self._first = np.cumsum(self._runs) - self._runs
        self._sizes = flat[1::2].astype(np.int64) - flat[::2]
        ends = np.cumsum(self._sizes)
        self._targets = ends - self._sizes
        self.total = int(ends[-1]) if len(ends) else 0

    def indices(self, sequences: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) of every value of these sequences, whose rows' values begin there."""
        runs = joined(self._first[sequences], self._runs[sequences])
        begins = np.repeat(begins, self._runs[sequences]) + self._offsets[runs]
        sizes = self._sizes[runs]
        return joined(begins, sizes), joined(self._targets[runs], sizes)
