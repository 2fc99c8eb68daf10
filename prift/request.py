"""What a set of examples asks of a cache, and which of its priors answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prift import spans
from prift.cache import PriorCache, list_priors, sequence_key
from prift.errors import CacheError, MissingPrior
from prift.examples import Examples
from prift.identity import PriorIdentity


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
    cache: PriorCache, examples: Examples, asked: Request, names: Sequence[str], command: str
) -> dict[str, np.ndarray]:
    """Statistics of all label tokens of all examples, joined in order.

    asked  request(examples)
    Raises MissingPrior saying how many sequences the cache lacks, the first of them, and
    `command`, which adds them.
    """
    absent = cache.missing(asked.keys, asked.spans, names)
    if absent:
        raise MissingPrior(
            f"{len(absent):,} of {len(examples):,} sequences have no prior in {cache.folder} "
            f"(first: {examples.where(absent[0])}). Run:\n  {command}"
        )
    return cache.read(asked.keys, asked.spans, names)


def digest(asked: Request, names: Sequence[str], folder: Path) -> str:
    """What decides the values that are read: the prior and its parts, and what is asked of them.

    folder  of the prior, in the cache
    """
    parts = sorted(path.name for path in folder.glob("parts/[!.]*.parquet"))
    values, counts = spans.flat(asked.spans)
    found = hashlib.sha256(json.dumps([folder.name, parts, list(names)]).encode())
    for array in (asked.keys, counts, values):
        found.update(array.tobytes())
    return found.hexdigest()[:32]


def choose_prior(
    root: str | Path, weights: str, config: str, prior_id: str | None, command: str
) -> PriorIdentity:
    """The prior of the cache to read.

    prior_id         one to take by name, or None: the only one with these digests
    weights, config  digests of the model to be trained, or of the model named by --prior
    Raises CacheError listing the priors there are and how they differ.
    """
    found = list_priors(root)
    if not found:
        raise CacheError(f"{root} holds no prior. Run:\n  {command}")
    if prior_id is not None:
        if prior_id not in found:
            raise CacheError(f"{root} holds no prior {prior_id}. It holds:\n{_listing(found)}")
        return found[prior_id]
    fitting = {k: v for k, v in found.items() if (v.weights, v.config) == (weights, config)}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise CacheError(
            f"{root} holds {len(fitting)} priors of this model; choose one with --prior ID:\n"
            + _listing(fitting)
        )
    raise CacheError(
        f"{root} holds no prior of this model (weights {weights[:12]}, config {config[:12]}). "
        f"It holds:\n{_listing(found, weights=weights, config=config)}\n"
        f"Choose one of them with --prior ID, or run:\n  {command}"
    )


def _listing(priors: Mapping[str, PriorIdentity], **wanted: str) -> str:
    """One line per prior with the fields in which they differ, from each other or from `wanted`
    (weights and config where they do not)."""
    values = list(priors.values())
    differing = {name for v in values for name in values[0].differences(v)}
    differing |= {n for n, w in wanted.items() if any(getattr(v, n) != w for v in values)}
    names = sorted(differing) or ["config", "weights"]
    lines = []
    for key, identity in priors.items():
        shown = ", ".join(f"{n} {str(getattr(identity, n))[:12]}" for n in names)
        lines.append(f"  --prior {key}  ({shown})")
    return "\n".join(lines)
