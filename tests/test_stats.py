"""Every path that computes statistics against the naive float64 definition: values, edge cases,
identities. The paths stand in tests/paths.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.stats import CORE, EXTENDED, NotADistribution, TokenStats, token_stats
from tests import references
from tests.paths import ALL, PATHS, representable

INF = math.inf
every_path = pytest.mark.parametrize("path", PATHS)
FLOATS = [name for name in ALL if name not in ("rank", "n_tie")]


def compare(path: str, logits, targets, names=CORE) -> None:
    """No further from float64 than the obvious float32 code, plus 1e-5 relative."""
    z = representable(logits, path)
    found = PATHS[path](z, targets, names)
    for i, target in enumerate(targets):
        truth, naive = references.token_stats(z[i], target), references.naive_float32(z[i], target)
        assert found["rank"][i] == truth["rank"] and found["n_tie"][i] == truth["n_tie"]
        for name in set(FLOATS) & set(names):
            if truth[name] in (-INF, 0.0):
                assert found[name][i] == pytest.approx(truth[name], abs=1e-6), name
                continue
            slack = 0.0 if math.isnan(naive[name]) else abs(naive[name] - truth[name])
            budget = min(slack, 1e-3) + 1e-5 * max(1, abs(truth[name]))
            assert abs(found[name][i] - truth[name]) <= budget, name


@every_path
def test_hand_computed(path):
    # q = (1/2, 1/4, 1/4): the second token has mass 1/4 + 1/4 at or below it, one token above.
    z = representable([[0.5, 0.0, 0.0]] * 3, path)
    q = np.exp([0.5, 0.0, 0.0]) / np.exp([0.5, 0.0, 0.0]).sum()
    found = PATHS[path](z, [0, 1, 2], ALL)
    np.testing.assert_allclose(found["logprob"], np.log(q), rtol=1e-6)
    np.testing.assert_allclose(found["log_mass_rank"], [0, *[np.log(q[1] + q[2])] * 2], rtol=1e-6)
    assert found["rank"].tolist() == [1, 2, 2]
    assert found["n_tie"].tolist() == [1, 2, 2]
    entropy = -(q * np.log(q)).sum()
    np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-6)
    np.testing.assert_allclose(found["collision"], (q**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(found["expected_rank"], q[0] + 2 * (q[1] + q[2]), rtol=1e-6)
    np.testing.assert_allclose(found["entropy_top20"], entropy, rtol=1e-6)


def test_a_half_and_two_quarters():
    """The textbook case: log 2 above two zeros."""
    stats = token_stats(torch.tensor([[math.log(2), 0.0, 0.0]] * 2), torch.tensor([0, 1]))
    np.testing.assert_allclose(stats.logprob, np.log([0.5, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(stats.log_mass_rank, np.log([1.0, 0.5]), rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, 1.5 * math.log(2), rtol=1e-6)


def test_types_and_names():
    stats = token_stats(torch.randn(3, 7), torch.tensor([0, 1, 2]), ALL)
    assert stats.names() == ALL
    for name in ALL:
        wanted = torch.int32 if name in ("rank", "n_tie") else torch.float32
        assert getattr(stats, name).dtype == wanted
    assert token_stats(torch.randn(3, 7), torch.tensor([0, 1, 2])).names() == CORE
    some = token_stats(torch.randn(3, 7), torch.tensor([0, 1, 2]), ("collision",))
    assert some.names() == (*CORE, "collision")


@every_path
def test_both_ends_underflow_as_probabilities(path):
    found = PATHS[path](representable([[0, -200, -201, -202]], path), [2])
    expected = -201 + math.log(1 + math.exp(-1))  # q(y) and q of the token below it
    assert found["log_mass_rank"][0] == pytest.approx(expected, rel=1e-6)
    assert found["logprob"][0] == pytest.approx(-201, rel=1e-6)


@every_path
@pytest.mark.parametrize("depth", [5, 12, 18, 40, 70])
def test_the_mass_rank_keeps_its_digits_down_the_tail(path, depth):
    """Relative error of u under 1e-4: down to 1e-8, and as far below as float32 logits reach."""
    z = np.full(30_000, -float(depth + 10), np.float32)
    z[0], z[17_000], z[20_000] = 0.0, -float(depth), -float(depth + 1)
    found = PATHS[path](z[None], [17_000])
    expected = references.token_stats(z, 17_000)["log_mass_rank"]
    assert abs(math.expm1(found["log_mass_rank"][0] - expected)) < 1e-4


@every_path
@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        ([0.0] * 5, 3, {"rank": 1, "n_tie": 5, "log_mass_rank": 0.0, "entropy": math.log(5)}),
        ([1e4, 0.0, 0.0], 0, {"rank": 1, "n_tie": 1, "logprob": 0.0, "entropy": 0.0}),
        ([1e4, 0.0, 0.0], 1, {"rank": 2, "n_tie": 2}),
        ([0.0, 0.0, -INF], 2, {"rank": 3, "n_tie": 1, "logprob": -INF, "log_mass_rank": -INF}),
        ([0.0, -INF, -INF], 0, {"rank": 1, "entropy": 0.0, "log_mass_rank": 0.0}),
        ([0.0, 1.0, -INF], 0, {"rank": 2, "n_tie": 1}),
        ([3.0], 0, {"rank": 1, "n_tie": 1, "logprob": 0.0, "log_mass_rank": 0.0, "entropy": 0.0}),
    ],
)
def test_edges(path, logits, target, expected):
    z = representable([logits], path)
    found = PATHS[path](z, [target])
    truth = references.token_stats(z[0], target)
    for name, value in {**{n: truth[n] for n in CORE}, **expected}.items():
        assert found[name][0] == pytest.approx(value, rel=1e-6, abs=1e-6), name


@every_path
@pytest.mark.parametrize("bad", [math.nan, INF, "all -inf"])
def test_not_a_distribution(path, bad):
    """A NaN logprob says so, and `check` raises."""
    z = np.zeros((5, 4), np.float32)
    z[3] = -INF if bad == "all -inf" else z[3]
    z[3, 1] = -INF if bad == "all -inf" else bad
    found = PATHS[path](z, [0] * 5)["logprob"]
    assert np.isnan(found).tolist() == [False, False, False, True, False]
    with pytest.raises(NotADistribution) as error:
        TokenStats(logprob=torch.tensor(found)).check()
    assert error.value.row == 3


def test_no_rows():
    stats = token_stats(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), ALL)
    assert stats.names() == ALL and all(len(getattr(stats, n)) == 0 for n in ALL)


@every_path
@pytest.mark.parametrize("vocabulary", [2, 3, 301, 511, 513, 2048, 2049, 8191, 8193, 16_384])
def test_error_budget(path, vocabulary):
    """Around every tile's edge; targets in the first and the last tile, and the most likely."""
    generator = np.random.default_rng(vocabulary)
    z = generator.normal(0, 3.0, (6, vocabulary)) + 8
    targets = [0, vocabulary - 1, vocabulary // 2, 1, int(z[4].argmax()), vocabulary // 3]
    compare(path, z, targets, ALL)


@every_path
@pytest.mark.parametrize("spread", [0.01, 30.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_spreads_and_offsets(path, spread, offset):
    generator = np.random.default_rng(7)
    z = representable(generator.normal(0, spread, (4, 3000)) + offset, path)
    compare(path, z, [int(z[0].argmax()), 5, 2999, int(np.argsort(z[3])[-2])], CORE)


@every_path
@pytest.mark.parametrize("vocabulary", [151_936, 200_000])
def test_a_large_vocabulary(path, vocabulary):
    generator = np.random.default_rng(vocabulary)
    z = representable(generator.normal(0, 3.0, (3, vocabulary)), path)
    z[2] = 0.25
    compare(path, z, [vocabulary - 1, int(z[1].argmax()), 7], (*CORE, "collision"))


@every_path
def test_twins_of_the_target_tie_wherever_they_stand(path):
    """In its own tile, in others, first and last."""
    z = representable(np.random.default_rng(3).normal(0, 2.0, (1, 20_000)), path)
    twins = [0, 511, 512, 2047, 2048, 8191, 8192, 19_999]
    z[0, twins] = z[0, 4000]
    truth = references.token_stats(z[0], 4000)
    for target in [4000, *twins]:
        found = PATHS[path](z, [target])
        assert found["n_tie"][0] == truth["n_tie"] >= 9
        assert found["rank"][0] == truth["rank"]
        assert found["log_mass_rank"][0] == pytest.approx(truth["log_mass_rank"], rel=1e-5)


def test_block_size_changes_nothing():
    z, y = torch.randn(50, 333) * 5, torch.randint(0, 333, (50,))
    one, many = token_stats(z, y, ALL, block_rows=1), token_stats(z, y, ALL, block_rows=50)
    for name in ALL:
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-6, atol=1e-7)


logit = st.one_of(
    # Products of bfloat16 operands take subnormal numbers for zero; no logit is one.
    st.floats(-50, 50, width=32, allow_subnormal=False),
    st.sampled_from([0.0, -INF, 1e4, -1e4, 1000.0, 1000.5]),
)


@every_path
@settings(max_examples=60, deadline=None)
@given(st.lists(logit, min_size=1, max_size=40), st.data())
def test_identities(path, logits, data):
    target = data.draw(st.integers(0, len(logits) - 1))
    if max(logits) == -INF:
        return
    z = representable(logits, path)
    found = {name: float(value[0]) for name, value in PATHS[path](z[None], [target], ALL).items()}
    truth = references.token_stats(z, target)
    assert (found["rank"] == 1) == (found["log_mass_rank"] == 0)
    assert found["rank"] == truth["rank"] and found["n_tie"] == truth["n_tie"]
    assert found["log_mass_rank"] >= found["logprob"] - 1e-5 * max(1, abs(found["logprob"]))
    assert 0 <= found["entropy"] <= math.log(len(logits)) + 1e-6
    assert found["logprob"] <= 0
    assert 1 / len(logits) - 1e-6 <= found["collision"] <= 1
    assert 1 <= found["expected_rank"] + 1e-6 and found["expected_rank"] <= len(logits)
    assert found["entropy_top20"] <= math.log(20) + 1e-6
    for name in FLOATS:
        assert found[name] == pytest.approx(truth[name], rel=1e-4, abs=1e-5), name
    z = z.astype(np.float64)
    q = np.exp(z - z.max())
    mass_above = (q / q.sum())[z > z[target]].sum()
    assert mass_above + math.exp(found["log_mass_rank"]) == pytest.approx(1, abs=1e-5)


def test_concatenate_keeps_order():
    parts = [TokenStats(rank=torch.tensor([1, 2])), TokenStats(rank=torch.tensor([3]))]
    assert TokenStats.concatenate(parts).rank.tolist() == [1, 2, 3]


def test_the_computations_that_benchmarks_compare_with_are_right():
    z = np.random.default_rng(0).normal(0, 3, (20, 400)).astype(np.float32)
    z[:, 7] = z[:, 9]
    targets = [7, *range(19)]
    sorted_ = references.sorted_stats(torch.tensor(z), torch.tensor(targets))
    own, score = references.online_score(torch.tensor(z), torch.tensor(targets))
    for i, target in enumerate(targets):
        truth = references.token_stats(z[i], target)
        found = [float(x[i]) for x in sorted_]
        assert found[0] == pytest.approx(truth["logprob"], abs=1e-5)
        assert found[1] == pytest.approx(references.mass_rank(z[i], target), abs=1e-5)
        assert found[2] == pytest.approx(truth["entropy"], abs=1e-5)
        assert float(own[i].log()) == pytest.approx(truth["logprob"], abs=1e-5)
        official = references.official_code_score(z[i], target)
        assert float(score[i]) == pytest.approx(official, abs=1e-5)


def test_extended_names_are_none_of_the_core():
    assert not set(CORE) & set(EXTENDED)


def test_logits_in_training_have_statistics_without_gradient():
    logits = torch.randn(3, 50, requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    found = token_stats(logits, targets, CORE + EXTENDED)
    wanted = token_stats(logits.detach(), targets, CORE + EXTENDED)
    for name in CORE + EXTENDED:
        value = getattr(found, name)
        assert not value.requires_grad and torch.equal(value, getattr(wanted, name))
