"""Scoring models in memory, and what the answers are compared with."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from prift.backends.hf import HFScorer
from prift.stats import CORE, TokenStats
from tests import references
from tests.cache_fixtures import IDENTITY

LENGTHS = [1, 2, 3, 17, 40, 40, 63, 5]


def sequences(vocabulary: int, lengths=LENGTHS, seed=0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, n).astype(np.int32) for n in lengths]


def all_positions(ids: list[np.ndarray]) -> list[np.ndarray]:
    return [np.arange(1, len(s)) for s in ids]


def scorer_of(model, *, logits_dtype: str = "float32", **options) -> HFScorer:
    """A scorer of this very model; the identity's hashes are made up."""
    dtype = str(model.dtype).removeprefix("torch.")
    identity = replace(IDENTITY, dtype=dtype, logits_dtype=logits_dtype)
    return HFScorer(model, identity, **options)


def logits_of(model, sequence: np.ndarray) -> np.ndarray:
    """The model's own logits [T, V] of one sequence run alone."""
    with torch.no_grad():
        ids = torch.tensor(sequence[None].astype(np.int64))
        return model(input_ids=ids).logits[0].double().numpy()


def check_against_truth(
    found: TokenStats, logits: np.ndarray, targets: np.ndarray, atol: float
) -> None:
    """Each statistic within atol; ranks, ties and masses where no near-tie decides them."""
    assert len(found.logprob) == len(targets) == len(logits)
    for i, target in enumerate(targets):
        truth = references.token_stats(logits[i], target)
        assert abs(found.logprob[i] - truth["logprob"]) <= atol
        assert abs(found.entropy[i] - truth["entropy"]) <= atol
        near = np.abs(logits[i] - logits[i, target]) < 1e-3
        if near.sum() == 1:
            assert found.rank[i] == truth["rank"] and found.n_tie[i] == 1
            assert abs(found.log_mass_rank[i] - truth["log_mass_rank"]) <= atol * 2
        else:  # the mass of the near-ties bounds what a swap among them can change
            nudged = logits[i].copy()
            nudged[near] = logits[i, target]
            most = math.log(references.mass_rank(nudged, target))
            nudged[near] += 1e-9
            nudged[target] -= 1e-9
            least = math.log(references.mass_rank(nudged, target))
            assert least - atol <= found.log_mass_rank[i] <= most + atol


def exactly(model):
    """The model in float64."""
    exact = model.double()
    exact.set_experts_implementation("eager")  # the grouped product of experts has no float64
    return exact


def tokens_run(model, work: Callable[[], object]) -> int:
    """How many tokens, padding included, the model embeds during `work`."""
    counts = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, given, answer: counts.append(given[0].numel())
    )
    try:
        work()
    finally:
        hook.remove()
    return sum(counts)


def assert_equal_stats(found: dict, wanted: dict, names=CORE, tolerance: float = 1e-4) -> None:
    """Of every sequence; ranks exactly, so for data without near-ties."""
    assert sorted(found) == sorted(wanted)
    for i, stats in wanted.items():
        for name in names:
            a, b = getattr(found[i], name), getattr(stats, name)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{i} {name}")
