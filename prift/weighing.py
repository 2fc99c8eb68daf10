"""Weights that are known before training.

A rule whose source is the prior, or that reads no statistics, weighs every label token of the data
once: quantiles and medians of a rule of batch scope are those of the whole data set.
"""

from collections.abc import Mapping

import numpy as np
import torch

from prift.errors import PriftError
from prift.stats import TokenStats
from prift.text.examples import Examples
from prift.threads import one_thread
from prift.weigher import Weigher

_CHUNK = 8192  # sequences weighed at once


@one_thread()
def weigh(
    weigher: Weigher,
    counts: np.ndarray,
    prior: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray] | None = None,
    roles: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [N]: the weight of each label token.

    counts  int64 [E]: label tokens of each example
    prior   statistics [N] that the weigher needs, flat over all examples in order
    base    those of the second prior, for a rule that compares two
    roles   uint8 [N], codes of prift.roles, for a rule that asks for them
    """
    weights = np.empty(int(counts.sum()), np.float32)
    ends = np.cumsum(counts)
    step = max(1, len(counts)) if weigher.scope == "batch" else _CHUNK
    for first in range(0, len(counts), step):
        own_counts = torch.from_numpy(counts[first : first + step])
        own = slice(ends[first] - counts[first], ends[min(first + step, len(counts)) - 1])
        sequence = torch.arange(len(own_counts)).repeat_interleave(own_counts)
        stats = _stats(prior, weigher.needs, own)
        role = torch.from_numpy(roles[own]) if weigher.by_role else None
        found = weigher(stats, sequence, _stats(base or {}, weigher.base, own), role)
        weights[own] = found.expand(own.stop - own.start).numpy()
    return weights


def weigh_without_statistics(weigher: Weigher, examples: Examples) -> np.ndarray:
    """float32 [N]: the weight of each label token by rules that read no statistics; without memory
    of its own where all weigh the same."""
    asked = {name for factor in weigher.factors for name in factor.rule.given()}
    if asked <= {"stats"}:
        one = weigher(TokenStats())
        return np.broadcast_to(one.numpy(), int(examples.label_counts.sum()))
    roles = examples.label_roles() if weigher.by_role else None
    weights = weigh(weigher, examples.label_counts, {}, roles=roles)
    check_weights(weigher, weights, examples)
    return weights


def check_weights(weigher: Weigher, weights: np.ndarray, examples: Examples) -> None:
    """Raises PriftError naming the first token whose weight is NaN, infinite, or negative under a
    rule that never is."""
    bad = ~np.isfinite(weights)
    if not weigher.signed:
        bad |= weights < 0
    found = np.flatnonzero(bad)
    if not len(found):
        return
    ((index, place),) = places(examples, found[:1])
    wanted = "finite" if weigher.signed else "finite, 0 or more"
    raise PriftError(
        f"rule {weigher.name} weighs token {place} of {examples.where(index)} "
        f"{float(weights[found[0]])}; wanted {wanted}. --max-weight bounds what grows too large."
    )


def places(examples: Examples, tokens: np.ndarray) -> list[tuple[int, int]]:
    """(example, position in it) of label tokens counted over all examples in order."""
    ends, found = np.cumsum(examples.label_counts), []
    for token in tokens:
        index = int(np.searchsorted(ends, token, "right"))
        within = int(token - ends[index] + examples.label_counts[index])
        found.append((index, int(np.flatnonzero(examples[index].label_mask)[within])))
    return found


def _stats(values: Mapping[str, np.ndarray], names: tuple[str, ...], own: slice) -> TokenStats:
    return TokenStats(**{n: torch.from_numpy(values[n][own].copy()) for n in names})


def kept(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [E]: label tokens of each example up to its last of nonzero weight."""
    ends, found = np.cumsum(counts), np.zeros(len(counts), np.int64)
    for first in range(0, len(counts), _CHUNK):
        own_ends, own_counts = ends[first : first + _CHUNK], counts[first : first + _CHUNK]
        begin = own_ends[0] - own_counts[0]
        nonzero = np.flatnonzero(weights[begin : own_ends[-1]]) + begin
        nonzero = np.concatenate([[-1], nonzero])
        last = nonzero[np.searchsorted(nonzero, own_ends) - 1]
        found[first : first + _CHUNK] = np.maximum(last + 1 - (own_ends - own_counts), 0)
    return found
