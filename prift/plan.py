"""What of each window is to be scored: what neither the cache has nor an earlier window asked for.

A Planner runs in the thread that reads ahead, so its counts are complete only when that is over.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prift import spans
from prift.cache import PriorCache
from prift.examples import Examples, Window
from prift.request import Request, request


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows to score of one window; todo.index counts within `examples`. last: see Window."""

    examples: Examples
    todo: Request
    last: bool


class Planner:
    """Plans one window after the other.

    positions  'labels' or 'all'
    names      statistics wanted of each row

    sequences      distinct ones so far; `scored` of them are to be scored by this run
    scored_tokens  in the rows to be scored; statistics_tokens: the positions asked for in them
    """

    def __init__(self, cache: PriorCache, positions: str, names: Sequence[str]):
        self._cache, self._positions, self.names = cache, positions, names
        self._asked = _Asked()
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
        self.scored += sum(len(runs) == 0 for runs in before)
        self.scored_tokens += int(window.examples.lengths[todo.index].sum())
        self.statistics_tokens += todo.num_positions
        return Plan(window.examples, todo, window.last)


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
