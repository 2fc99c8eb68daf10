"""Which sequences run together: of like length, longest first, under a budget that memory sets.

Longest first, because trouble then comes early and because equal lengths waste no padding. The
budget is found, not guessed: it begins high, and is halved each time a batch does not fit; the
batch is then cut again, so nothing is lost.
"""

import functools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that run together whatever else does: one alone, or several with one prompt.

    members  their indices; lengths  their tokens
    prompt   how many tokens they share, none of them scored; 0 for one alone
    """

    members: list[int]
    lengths: list[int]
    prompt: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens that the model runs over, padding within the group included."""
        return self.prompt + len(self.members) * (self.longest - self.prompt)

    def halves(self) -> "list[Group]":
        """The same sequences in two groups, or each alone where there are three or fewer."""
        half = len(self.members) // 2
        if half < 2:
            return self.apart()
        parts = slice(None, half), slice(half, None)
        return [Group(self.members[p], self.lengths[p], self.prompt) for p in parts]

    def apart(self) -> "list[Group]":
        """The same sequences, each alone."""
        return [Group([i], [n]) for i, n in zip(self.members, self.lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class _Size:
    """Of a batch: its sequences, its longest prompt, and its longest rest of a sequence."""

    sequences: int = 0
    prompt: int = 0
    rest: int = 0

    def plus(self, group: Group) -> "_Size":
        return _Size(
            self.sequences + len(group.members),
            max(self.prompt, group.prompt),
            max(self.rest, group.longest - group.prompt),
        )

    @property
    def tokens(self) -> int:
        """Padded tokens attended to. A shared prompt counts once per sequence: each has its own
        copy of the keys, of all layers, and they take as much memory as running over it."""
        return self.sequences * (self.prompt + self.rest)


class Batches:
    """Groups, cut into batches one at a time; those that share a prompt first and by themselves.

    budget  tokens of a batch, as `_Size` counts them; a larger group runs alone
    edge    lengths up to it and beyond are never mixed; 0: there is none
    """

    def __init__(self, groups: Iterable[Group], budget: int, edge: int = 0):
        self._left = deque(sorted(groups, key=lambda g: (not g.prompt, -g.longest)))
        self._edge = edge
        self.budget = budget

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self) -> list[Group]:
        """The next batch."""
        batch, size = [], _Size()
        while self._left:
            grown = size.plus(self._left[0])
            if batch and (grown.tokens > self.budget or not self._alike(batch[0], self._left[0])):
                break
            batch.append(self._left.popleft())
            size = grown
        return batch

    def _alike(self, first: Group, other: Group) -> bool:
        beyond = [g.longest > self._edge for g in (first, other)]
        both = bool(first.prompt) == bool(other.prompt) and beyond[0] == beyond[1]
        return both and other.longest <= first.longest

    def give_back(self, batch: list[Group]) -> bool:
        """Takes back a batch that did not fit, and halves the budget; a group goes back in halves.
        False: it was one sequence, which cannot be cut."""
        if len(batch) == 1 and len(batch[0].members) == 1:
            return False
        size = functools.reduce(_Size.plus, batch, _Size())
        self.budget = max(1, min(self.budget, size.tokens // 2))
        if len(batch) == 1:
            batch = sorted(batch[0].halves(), key=lambda g: -g.longest)
        self._left.extendleft(reversed(batch))
        return True
