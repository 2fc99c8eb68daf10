"""What vLLM's public answer says for certain, against the naive float64 definition; and what it
leaves open."""

import math

import numpy as np
import pytest
import torch

from prift.backends.vllm_bounds import STATISTICS, known_stats
from tests import references
from tests.test_vllm_columns import drawn

EXACT = 1e-5  # of log u: what float32 log-probabilities leave open


def public(logits, targets, K):
    """As vLLM answers: (log-probabilities [N, K+1] of the target and the K first, how many reach
    the target)."""
    logprobs = logits.log_softmax(1, torch.float32)
    own = logprobs.gather(1, targets[:, None])
    reaching = (logprobs >= own).sum(1)
    return torch.cat([own, logprobs.topk(K, 1).values], 1).numpy(), reaching.numpy()


@pytest.mark.parametrize("V, K", [(50, 5), (2000, 20), (2000, 0), (50_000, 100), (60, 60)])
def test_what_is_known_is_right_and_what_lies_beyond_the_list_is_not_known(V, K):
    logits, targets = drawn(60, V, seed=K)
    stats, known = known_stats(*public(logits, targets, K), V)
    assert stats.names() == STATISTICS
    for i, target in enumerate(targets.tolist()):
        truth = references.token_stats(logits[i].numpy(), target)
        last = truth["rank"] + truth["n_tie"] - 1
        if truth["rank"] > K + 1:
            assert not known[i]
        if last <= min(K, V - 1) and truth["log_mass_rank"] > math.log(0.35) or K >= V:
            assert known[i], i
        if known[i]:
            assert stats.rank[i] == truth["rank"] and stats.n_tie[i] == truth["n_tie"]
            assert abs(stats.logprob[i] - truth["logprob"]) < 1e-5
            assert abs(stats.log_mass_rank[i] - truth["log_mass_rank"]) <= EXACT
            assert (stats.log_mass_rank[i] == 0) == (truth["rank"] == 1)
    assert known.any()


def test_a_token_deep_below_a_peak_is_known_where_the_list_is_whole_and_else_not():
    logits = torch.tensor([[30.0] + [0.0] * 9 + [-1.0]])
    target = torch.tensor([10])
    stats, known = known_stats(*public(logits, target, 11), 11)
    truth = references.token_stats(logits[0].numpy(), 10)
    assert known[0] and abs(stats.log_mass_rank[0] - truth["log_mass_rank"]) <= EXACT
    _, known = known_stats(*public(logits, target, 11), 100_000)  # much might hide below
    assert not known[0]


def test_ties_across_the_end_of_the_list_are_not_known():
    logits = torch.tensor([[1.1, 1.0, 0.9, 0.9, 0.9, 0.0]])
    for K, sure in [(1, False), (2, False), (3, True), (4, True)]:
        # K = 2 lists what is above alone: whether more is, does not follow
        stats, known = known_stats(*public(logits, torch.tensor([3]), K), 6)
        assert known[0] == sure, K
        if sure:
            assert (int(stats.rank[0]), int(stats.n_tie[0])) == (3, 3)


def test_a_broken_row_is_told():
    logits, targets = drawn(3, 40)
    logprobs, reaching = public(logits, targets, 5)
    logprobs[1] = np.nan
    stats, _ = known_stats(logprobs, reaching, 40)
    assert stats.logprob.isnan().tolist() == [False, True, False]


def test_mass_that_is_not_listed_is_not_taken_for_none():
    """The token is the last of the list, below a peak, and others like it follow."""
    logits = torch.tensor([[8.0, 0.0, -1.0, -1.01, -1.02, -1.03]])
    target = torch.tensor([2])
    for K, sure in [(3, False), (4, False), (5, False), (6, True)]:
        stats, known = known_stats(*public(logits, target, K), 6)
        assert known[0] == sure, K
    truth = references.token_stats(logits[0].numpy(), 2)
    assert abs(stats.log_mass_rank[0] - truth["log_mass_rank"]) <= EXACT


def test_what_float32_leaves_of_the_mass_above_is_too_coarse_for_a_token_below_most_of_it():
    logits = torch.tensor([[3.0, 0.0, -1.0, -30.0, -30.0, -30.0]])
    for K, sure in [(3, False), (4, True)]:  # the fourth says that there is nothing more
        _, known = known_stats(*public(logits, torch.tensor([1]), K), 6)
        assert known[0] == sure, K
