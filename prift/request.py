"""What a set of examples asks of a cache, and reading it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from prift.cache import PriorCache, sequence_key
from prift.errors import MissingPrior
from prift.stats import CORE
from prift.store import spans
from prift.store.index import Index
from prift.text.examples import Examples


@dataclass(frozen=True, slots=True)
class Request:
    """Rows wanted, one per sequence.

    keys   'S16' [N]
    spans  N int32 arrays of runs: the positions asked for
    index  int64 [N]: which example each row stands for
    """

    keys: np.ndarray
    spans: list[np.ndarray]
    index: np.ndarray

    def united(self) -> "Request":
        """Equal sequences once, each asking for all that its copies ask for."""
        _, first, group = np.unique(self.keys, return_index=True, return_inverse=True)
        wanted = [self.spans[i] for i in first]
        copies = np.ones(len(self.keys), bool)
        copies[first] = False
        for i in np.flatnonzero(copies):
            if wanted[group[i]].tobytes() != self.spans[i].tobytes():
                wanted[group[i]] = spans.union(wanted[group[i]], self.spans[i])
        order = np.argsort(first)
        return Request(
            self.keys[first[order]], [wanted[i] for i in order], self.index[first[order]]
        )

    def subset(self, rows: Sequence[int]) -> "Request":
        """These rows only."""
        return Request(self.keys[rows], [self.spans[i] for i in rows], self.index[rows])

    @property
    def num_positions(self) -> int:
        """Positions asked for, all rows together."""
        return sum(spans.count(s) for s in self.spans)


def request(examples: Examples, positions: str = "labels") -> Request:
    """What these examples need: their label positions, or 'all' positions but the first."""
    keys, wanted = [], []
    for example in examples:
        keys.append(sequence_key(example.input_ids))
        if positions == "all":
            wanted.append(np.array([1, len(example.input_ids)], np.int32))
        else:
            wanted.append(spans.spans_of(example.label_mask))
    return Request(np.array(keys, "S16"), wanted, np.arange(len(keys)))


def read_prior(
    cache: PriorCache,
    examples: Examples,
    asked: Request,
    names: Sequence[str],
    command: str,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
    """Statistics of all label tokens of all examples, joined in order.

    asked  request(examples)
    say    told, where it is so, how many of the sequences are read in half precision

    Raises MissingPrior saying how many sequences the cache lacks, the first of them, and
    `command`, which adds them.
    """
    absent = cache.missing(asked.keys, asked.spans, names)
    if absent:
        few = [n for n in names if n in CORE]
        scored = len(few) < len(names) and not cache.missing(asked.keys, asked.spans, few)
        what = " and no ".join(n for n in names if n not in CORE) if scored else "prior"
        raise MissingPrior(
            f"{len(absent):,} of {len(examples):,} sequences have no {what} in {cache.folder} "
            f"(first: {examples.where(absent[0])}). Run:\n  {command}"
        )
    found = cache.read(asked.keys, asked.spans, names)
    if half := _in_half(cache, asked, names):
        say(f"{half:,} of {len(asked.keys):,} sequences are stored in half precision "
            f"in {cache.folder}")  # fmt: skip
    return found


def _in_half(cache: PriorCache, asked: Request, names: Sequence[str]) -> int:
    """How many of the rows wanted, all of which are there, come from parts in half precision:
    those that no other part has."""
    whole = [part for part in cache.parts.values() if not part.half]
    if len(whole) == len(cache.parts):
        return 0
    found = Index(whole).find(asked.keys, *spans.flat(asked.spans), list(names))
    return int((found < 0).sum())


def digest(asked: Request, names: Sequence[str], prior: str, parts: Sequence[str]) -> str:
    """What decides the values that are read: the prior and its parts, and what is asked of them.

    prior  its id; parts: names of its files
    """
    values, counts = spans.flat(asked.spans)
    found = hashlib.sha256(json.dumps([prior, sorted(parts), list(names)]).encode())
    for array in (asked.keys, counts, values):
        found.update(array.tobytes())
    return found.hexdigest()[:32]
