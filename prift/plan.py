"""What of each window is to be scored: what neither the cache has nor an earlier window asked for.

A Planner runs in the thread that reads ahead, so its counts are complete only when that is over.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prift.cache import PriorCache
from prift.request import Request, request
from prift.store import spans
from prift.text.examples import Examples, Window


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows to score of one window; todo.index counts within `examples`.

    fresh   bool [N]: rows that no earlier window of this run asked for
    number  of the window, from 0; name: a hash of all that it asks for, whatever the cache has
    last    see Window
    """

    examples: Examples
    todo: Request
    fresh: np.ndarray
    last: bool
    number: int = 0
    name: str = ""

    def subset(self, rows: np.ndarray) -> "Plan":
        """To score these rows only."""
        return replace(self, todo=self.todo.subset(rows), fresh=self.fresh[rows])

    @property
    def tokens(self) -> int:
        """Of the sequences to score."""
        return int(self.examples.lengths[self.todo.index].sum())


class Planner:
    """Plans one window after the other.

    positions  'labels' or 'all'
    names      statistics wanted of each row

    sequences      distinct ones so far; `scored` of them were not in the cache when planned
    scored_tokens  in the rows to be scored; statistics_tokens: the positions asked for in them
    """

    def __init__(self, cache: PriorCache, positions: str, names: Sequence[str]):
        self._cache, self._positions, self.names = cache, positions, names
        self._asked, self._windows = _Asked(), 0
        self.scored = self.scored_tokens = self.statistics_tokens = 0

    @property
    def sequences(self) -> int:
        return len(self._asked)

    def plan(self, window: Window) -> Plan:
        """Equal sequences once. One that an earlier window had asked for in part is scored again,
        for all that both ask for: a reader may ask for all of it, and takes one row."""
        wanted = request(window.examples, self._positions).united()
        scored = self._asked.scored(wanted.keys)
        covered, _ = spans.cover(*spans.flat(scored), *spans.flat(wanted.spans))
        open_rows = np.flatnonzero(~covered)
        some = wanted.subset(open_rows)
        rows = open_rows[self._cache.missing(some.keys, some.spans, self.names)]
        todo = wanted.subset(rows)
        before = [scored[i] for i in rows]
        todo = Request(todo.keys, list(map(spans.union, before, todo.spans)), todo.index)
        self._asked.add(wanted.keys, todo.keys, todo.spans)
        fresh = np.array([len(runs) == 0 for runs in before], bool)
        name = _digest(wanted, self._positions, self.names)
        plan = Plan(window.examples, todo, fresh, window.last, self._windows, name)
        self._windows += 1
        self.scored += int(fresh.sum())
        self.scored_tokens += plan.tokens
        self.statistics_tokens += todo.num_positions
        return plan


def _digest(wanted: Request, positions: str, names: Sequence[str]) -> str:
    """24 hex digits."""
    found = hashlib.sha256(" ".join([positions, *names]).encode())
    for array_ in (wanted.keys, *spans.flat(wanted.spans)):
        found.update(array_.tobytes())
    return found.hexdigest()[:24]


def lacking(plans: Iterator[Plan], tell: Callable[[], None]) -> Iterator[Plan]:
    """The plans with something to score. Calls `tell` once all is read, before the last of them."""
    told = False
    for plan in plans:
        if plan.last:
            told = True
            tell()
        if len(plan.todo.keys):
            yield plan
    if not told:
        tell()


class _Asked:
    """Distinct keys, and of those that are scored, which runs: about 40 bytes a sequence."""

    def __init__(self) -> None:
        self._keys = np.zeros(0, "S16")  # sorted
        self._begins, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._flat = array("i")  # runs of key i: flat[begin : begin + count]; count 0: not scored

    def __len__(self) -> int:
        return len(self._keys)

    def scored(self, keys: np.ndarray) -> list[np.ndarray]:
        """int32 runs of each of these keys ('S16' [N]); empty where it is not scored."""
        at, known = self._find(keys)
        begins, counts = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
        begins[known], counts[known] = self._begins[at[known]], self._counts[at[known]]
        return [
            np.array(self._flat[b : b + c], np.int32)
            for b, c in zip(begins.tolist(), counts.tolist(), strict=True)
        ]

    def add(self, keys: np.ndarray, scored: np.ndarray, runs: list[np.ndarray]) -> None:
        """keys: distinct; scored: those of them that are scored, each for all of its runs."""
        at, known = self._find(keys)
        new, at = keys[~known], at[~known]
        order = np.argsort(new)
        self._keys = np.insert(self._keys, at[order], new[order])
        self._begins = np.insert(self._begins, at, 0)
        self._counts = np.insert(self._counts, at, 0)
        place = np.searchsorted(self._keys, scored)
        flat, counts = spans.flat(runs)
        self._begins[place] = len(self._flat) + np.cumsum(counts) - counts
        self._counts[place] = counts
        self._flat.frombytes(flat.tobytes())

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each key is or belongs, and whether it is there."""
        at = np.searchsorted(self._keys, keys)
        known = np.zeros(len(keys), bool)
        inside = at < len(self._keys)
        known[inside] = self._keys[at[inside]] == keys[inside]
        return at, known
