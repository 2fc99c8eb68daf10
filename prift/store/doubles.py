"""Rows of one prior with the same key: two scorings of the same tokens, which must agree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prift.agreement import difference, over_budget
from prift.identity import PriorIdentity
from prift.store import spans
from prift.store.inventory import Contents

_COMPARED = ("logprob", "entropy")


@dataclass(frozen=True, slots=True)
class _Seen:
    """The first row of a key. places: scored positions."""

    length: int
    places: np.ndarray
    values: dict[str, np.ndarray]
    half: bool


class Doubles:
    """Remembers the first row of every key that has several, and compares the others with it.

    Holds two statistics of those rows: 8 bytes a token.
    """

    def __init__(self, contents: Contents, identity: PriorIdentity | None):
        self._keys = np.unique(contents.keys[~contents.first])
        self._dtypes = (identity.dtype, identity.logits_dtype) if identity else ("unknown",)
        self._seen: dict[bytes, _Seen] = {}

    def check(
        self,
        keys: np.ndarray,
        lengths: np.ndarray,
        runs: Sequence[np.ndarray],
        values: dict[str, np.ndarray],
        half: bool,
    ) -> Iterator[tuple[int, str, str | None]]:
        """(row, what is wrong, statistic) of a row group's rows that disagree with earlier ones.

        runs    of each row
        values  statistics of all rows, joined; half: some are stored in half precision
        """
        if not len(self._keys):
            return
        ends = np.cumsum([spans.count(one) for one in runs])
        for row in np.flatnonzero(np.isin(keys, self._keys)).tolist():
            places = spans.positions_of(runs[row])
            own = {
                name: values[name][ends[row] - len(places) : ends[row]].astype(np.float32)
                for name in _COMPARED
                if name in values
            }
            new = _Seen(int(lengths[row]), places, own, half)
            first = self._seen.setdefault(bytes(keys[row]), new)
            if first is not new:
                yield from ((row, what, name) for name, what in self._compare(first, new))

    def _compare(self, first: _Seen, other: _Seen) -> Iterator[tuple[str | None, str]]:
        if first.length != other.length:
            yield (
                None,
                (
                    f"another row with the same key says that it has {first.length} tokens, "
                    f"not {other.length}"
                ),
            )
            return
        _, a, b = np.intersect1d(
            first.places, other.places, assume_unique=True, return_indices=True
        )
        dtypes = (*self._dtypes, *(["float16"] if first.half or other.half else []))
        for name in _COMPARED:
            if not len(a) or name not in first.values or name not in other.values:
                continue
            off = difference(first.values[name][a], other.values[name][b])
            if over_budget(off, dtypes):
                at = int(off.argmax())
                here, there = other.values[name][b][at], first.values[name][a][at]
                yield (
                    name,
                    f"{name} is {here:.6g} at position {other.places[b][at]}, {there:.6g} in an "
                    f"earlier row with the same key; over {len(a)} tokens they differ by "
                    f"{off.mean():.2g} on average, more than rounding explains",
                )
