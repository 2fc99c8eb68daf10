"""What a reader knows of a cache without its statistics: the keys and spans of all rows.

Rows are numbered part after part, row group after row group. Of rows with equal keys the first by
part name comes first, but any in half precision after all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prift.store import parts, spans


@dataclass(frozen=True, slots=True)
class PartIndex:
    """One part's rows.

    name         its file's
    names        the statistics it holds
    half         whether any of them is in half precision
    keys         'S16' [R]
    spans        int32, the runs of all rows; counts: int64 [R], how many numbers of them are whose
    group_rows   rows of each row group
    """

    name: str
    names: frozenset[str]
    half: bool
    keys: np.ndarray
    spans: np.ndarray
    counts: np.ndarray
    group_rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Scored positions of all rows."""
        return int((self.spans[1::2].astype(np.int64) - self.spans[::2]).sum())

    @staticmethod
    def read(path: Path) -> "PartIndex":
        """From the part's file. Raises CacheError for a file that is no part."""
        names, half = parts.part_columns(path)
        keys, flat, counts = [np.zeros(0, "S16")], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for group in parts.read_row_groups(path, ["key", "length", "spans"], verify=True):
            values, sizes = group["spans"]
            if not spans.all_valid(values, sizes, group["length"]):
                raise parts.damaged(path, "a row's spans are no runs within its sequence")
            keys.append(group["key"])
            flat.append(values)
            counts.append(sizes)
        rows = tuple(len(sizes) for sizes in counts[1:])
        joined = (np.concatenate(arrays) for arrays in (keys, flat, counts))
        return PartIndex(path.name, frozenset(names), half, *joined, rows)


class Index:
    """The rows of these parts.

    names        of the parts, in the order of the rows
    tokens       int64 [rows]: scored positions of each row
    groups       (part, number within it) of each row group
    group_ends   int64: the row behind each row group
    owner        int32 [rows]: the part of each row
    """

    def __init__(self, found: Sequence[PartIndex]):
        found = sorted(found, key=lambda part: (part.half, part.name))
        self.names = [part.name for part in found]
        self._columns = [part.names for part in found]
        self.groups = [(n, g) for n, part in enumerate(found) for g in range(len(part.group_rows))]
        group_rows = [rows for part in found for rows in part.group_rows]
        self.group_ends = np.cumsum(group_rows, dtype=np.int64)
        sizes = [len(part.keys) for part in found]
        self.owner = np.repeat(np.arange(len(found), dtype=np.int32), sizes)
        self._spans = np.concatenate([np.zeros(0, np.int32), *(part.spans for part in found)])
        self._counts = np.concatenate([np.zeros(0, np.int64), *(part.counts for part in found)])
        self._span_begins = np.cumsum(self._counts) - self._counts
        lengths = self._spans[1::2].astype(np.int64) - self._spans[::2]
        runs, begins = np.concatenate([[0], np.cumsum(lengths)]), self._span_begins // 2
        self.tokens = runs[begins + self._counts // 2] - runs[begins]
        self._halves = _halves(np.concatenate([np.zeros(0, "S16"), *(p.keys for p in found)]))
        self._order = np.argsort(self._halves[:, 0], kind="stable")
        self._sorted = self._halves[self._order, 0]

    def __len__(self) -> int:
        return len(self._halves)

    def find(
        self, keys: np.ndarray, flat: np.ndarray, counts: np.ndarray, names: Sequence[str]
    ) -> np.ndarray:
        """int64 [N]: the first row that serves each sequence; -1 = none.

        keys          'S16' [N]
        flat, counts  `spans.flat` of the positions asked for
        names         statistics asked for
        """
        holds = np.array([set(names) <= columns for columns in self._columns], bool)
        halves = _halves(keys)
        at = np.searchsorted(self._sorted, halves[:, 0])
        begins = np.cumsum(counts) - counts
        found = np.full(len(keys), -1, np.int64)
        todo = np.arange(len(keys))
        while True:  # once per row that some key has
            todo = todo[at[todo] < len(self._sorted)]
            todo = todo[self._sorted[at[todo]] == halves[todo, 0]]
            if not len(todo):
                return found
            rows = self._order[at[todo]]
            own = flat[spans.joined(begins[todo], counts[todo])]
            serves = self.cover(rows, own, counts[todo])[0] & holds[self.owner[rows]]
            serves &= self._halves[rows, 1] == halves[todo, 1]
            found[todo[serves]] = rows[serves]
            todo = todo[~serves]
            at[todo] += 1

    def cover(
        self, rows: np.ndarray, wanted: np.ndarray, wanted_counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`spans.cover` of these rows."""
        counts = self._counts[rows]
        stored = self._spans[spans.joined(self._span_begins[rows], counts)]
        return spans.cover(stored, counts, wanted, wanted_counts)


def _halves(keys: np.ndarray) -> np.ndarray:
    """uint64 [N, 2] of 'S16' keys: found several times faster than bytes are."""
    return np.ascontiguousarray(keys, "S16").view(np.uint64).reshape(-1, 2)
