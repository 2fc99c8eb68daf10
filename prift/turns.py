"""Which windows this process scores, and when, while others may work on the same cache.

First those that nobody has in work; then, of the others', what is still missing. So processes that
run the same command share its work, and each returns only when the cache holds everything.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prift.cache import PriorCache, sequence_key
from prift.errors import DataError
from prift.plan import Plan
from prift.request import Request
from prift.store import spans
from prift.store.claims import Claims
from prift.text.examples import Window


class Turns:
    """Plans in the order in which this process takes them.

    again  the windows once more, from the first: called where others left rows undone
    own    names of parts that this process wrote: not looked at

    scored, scored_tokens, statistics_tokens   of the plans taken so far, as Planner counts them
    left_tokens                                in what others were found to score, or left out
    left_out                                   sequences that the backend could not score exactly
    """

    def __init__(
        self,
        cache: PriorCache,
        claims: Claims,
        names: Sequence[str],
        again: Callable[[], Iterable[Window]],
        say: Callable[[str], None],
    ):
        self.cache, self.claims, self._names = cache, claims, names
        self._again, self._say = again, say
        self._deferred: dict[int, _Deferred] = {}
        self.own: set[str] = set()
        self.scored = self.scored_tokens = self.statistics_tokens = self.left_tokens = 0
        self.left_out = 0

    def take(self, plans: Iterable[Plan]) -> Iterator[Plan]:
        """Of each plan what is to be scored here: nothing that the cache has by then. Its `name`
        is claimed, until whoever stores the rows calls Claims.release."""
        for plan in plans:
            if self.claims.take(plan.name):
                yield from self._taken(plan)
            else:
                if not self._deferred:
                    self._say("another process scores the same data: each leaves to the other "
                              "what that has in work")  # fmt: skip
                self.left_tokens += plan.tokens
                self._deferred[plan.number] = _Deferred.of(plan)
        for late in self._deferred.values():
            self.claims.wait(late.name, self._say)
        yield from self._undone()

    def _undone(self) -> Iterator[Plan]:
        """What others had in work and did not store. Raises DataError where the data, read again,
        are others."""
        self.cache.refresh(self.own)
        undone = {n: late for n, late in self._deferred.items() if len(self._missing(late.todo()))}
        if not undone:
            return
        self._say(f"{len(undone):,} windows of the data were left undone: reading it again")
        for number, window in enumerate(self._again()):
            if number in undone:
                late = undone.pop(number)
                self.claims.take_late(late.name)  # or not: then the same work may be done twice
                plan = late.plan(window, number)
                self.left_tokens -= plan.tokens
                yield from self._taken(plan)
            if not undone:
                return
        raise _changed()

    def _taken(self, plan: Plan) -> Iterator[Plan]:
        self.cache.refresh(self.own)
        rows = self._missing(plan.todo)
        some = plan.subset(rows) if len(rows) < len(plan.todo.keys) else plan
        self.left_tokens += plan.tokens - some.tokens
        if not len(rows):
            self.claims.release([plan.name])
            return
        self.scored += int(some.fresh.sum())
        self.scored_tokens += some.tokens
        self.statistics_tokens += some.todo.num_positions
        yield some

    def leave(self, plan: Plan, rows: np.ndarray) -> None:
        """Of a plan that was taken, these rows were not scored after all."""
        if not len(rows):
            return
        some = plan.subset(rows)
        self.left_out += len(rows)
        self.left_tokens += some.tokens
        self.scored -= int(some.fresh.sum())
        self.scored_tokens -= some.tokens
        self.statistics_tokens -= some.todo.num_positions

    def _missing(self, todo: Request) -> np.ndarray:
        return np.array(self.cache.missing(todo.keys, todo.spans, self._names), np.int64)


@dataclass(frozen=True, slots=True)
class _Deferred:
    """What is kept of a plan until its turn comes: about 50 bytes a sequence."""

    name: str
    keys: np.ndarray
    flat: np.ndarray
    counts: np.ndarray
    index: np.ndarray
    fresh: np.ndarray

    @staticmethod
    def of(plan: Plan) -> "_Deferred":
        todo = plan.todo
        return _Deferred(plan.name, todo.keys, *spans.flat(todo.spans), todo.index, plan.fresh)

    def todo(self) -> Request:
        runs = np.split(self.flat, np.cumsum(self.counts)[:-1])
        return Request(self.keys, runs, self.index)

    def plan(self, window: Window, number: int) -> Plan:
        """Of the same window, read again. Raises DataError where it is not the same."""
        ids = [window.examples[i].input_ids for i in self.index if i < len(window.examples)]
        if not np.array_equal(np.array([sequence_key(one) for one in ids], "S16"), self.keys):
            raise _changed()
        return Plan(window.examples, self.todo(), self.fresh, window.last, number, self.name)


def _changed() -> DataError:
    return DataError(
        "the data are not what they were when this run began. Run the same command again."
    )
