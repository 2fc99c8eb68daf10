"""token_stats against the naive float64 definition: values, edge cases, identities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.stats import CORE, NotADistribution, TokenStats, token_stats
from tests import references

INF = math.inf


def ours(logits, targets, **options) -> dict[str, np.ndarray]:
    stats = token_stats(torch.tensor(logits, dtype=torch.float32), torch.tensor(targets), **options)
    return {name: getattr(stats, name).numpy() for name in CORE}


def test_hand_computed():
    # q = (1/2, 1/4, 1/4): the second token has mass 1/4 + 1/4 at or below it, one token above.
    z = [[math.log(2), 0.0, 0.0]] * 3
    found = ours(z, [0, 1, 2])
    np.testing.assert_allclose(found["logprob"], np.log([0.5, 0.25, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(found["log_mass_rank"], np.log([1.0, 0.5, 0.5]), rtol=1e-6)
    assert found["rank"].tolist() == [1, 2, 2]
    assert found["n_tie"].tolist() == [1, 2, 2]
    np.testing.assert_allclose(found["entropy"], 1.5 * math.log(2), rtol=1e-6)


def test_types():
    stats = token_stats(torch.randn(3, 7), torch.tensor([0, 1, 2]))
    assert [getattr(stats, n).dtype for n in CORE] == [
        torch.float32, torch.float32, torch.int32, torch.int32, torch.float32,
    ]  # fmt: skip


def test_both_ends_underflow_as_probabilities():
    found = ours([[0, -200, -201, -202]], [2])
    expected = -201 + math.log(1 + math.exp(-1))  # q(y) and q of the token below it
    assert found["log_mass_rank"][0] == pytest.approx(expected, rel=1e-6)
    assert found["logprob"][0] == pytest.approx(-201, rel=1e-6)


def test_deep_tail_keeps_relative_precision():
    z = np.concatenate([[0.0], np.full(50_000, -40.0)])
    z[7] = -41
    expected = references.token_stats(z, 7)
    assert ours([z], [7])["log_mass_rank"][0] == pytest.approx(expected["log_mass_rank"], rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        ([0.0] * 5, 3, {"rank": 1, "n_tie": 5, "log_mass_rank": 0.0, "entropy": math.log(5)}),
        ([1e4, 0.0, 0.0], 0, {"rank": 1, "n_tie": 1, "logprob": 0.0, "entropy": 0.0}),
        ([1e4, 0.0, 0.0], 1, {"rank": 2, "n_tie": 2, "logprob": -1e4}),
        ([0.0, 0.0, -INF], 2, {"rank": 3, "n_tie": 1, "logprob": -INF, "log_mass_rank": -INF}),
        ([0.0, -INF, -INF], 0, {"rank": 1, "entropy": 0.0, "log_mass_rank": 0.0}),
        ([3.0], 0, {"rank": 1, "n_tie": 1, "logprob": 0.0, "log_mass_rank": 0.0, "entropy": 0.0}),
    ],
)
def test_edges(logits, target, expected):
    found = ours([logits], [target])
    for name, value in expected.items():
        assert found[name][0] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_not_a_distribution(bad):
    z = torch.zeros(5, 4)
    z[3, 1] = bad
    with pytest.raises(NotADistribution) as error:
        token_stats(z, torch.zeros(5, dtype=torch.long), block_rows=2)
    assert error.value.row == 3


def test_all_minus_infinity_is_no_distribution():
    with pytest.raises(NotADistribution):
        token_stats(torch.full((1, 4), -INF), torch.tensor([0]))


def test_no_rows():
    stats = token_stats(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert stats.names() == CORE and len(stats.rank) == 0


@pytest.mark.parametrize("vocabulary", [2, 301, 8191, 8193, 151_936])
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_error_budget(vocabulary, spread):
    """No further from float64 than naive float32, plus 1e-5 relative."""
    generator = np.random.default_rng(vocabulary)
    rows = 4 if vocabulary > 10_000 else 20
    z = (generator.normal(0, spread, (rows, vocabulary)) + 100).astype(np.float32)
    targets = generator.integers(0, vocabulary, rows)
    targets[0] = z[0].argmax()
    found = ours(z, targets)
    for i, target in enumerate(targets):
        truth, naive = references.token_stats(z[i], target), references.naive_float32(z[i], target)
        assert found["rank"][i] == truth["rank"] and found["n_tie"][i] == truth["n_tie"]
        for name in ("logprob", "log_mass_rank", "entropy"):
            budget = abs(naive[name] - truth[name]) + 1e-5 * max(1, abs(truth[name]))
            assert abs(found[name][i] - truth[name]) <= budget, name


def test_block_size_changes_nothing():
    z, y = torch.randn(50, 333) * 5, torch.randint(0, 333, (50,))
    one, many = token_stats(z, y, 1), token_stats(z, y, 50)
    for name in CORE:
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-6, atol=1e-7)


logit = st.one_of(
    st.floats(-50, 50, width=32), st.sampled_from([0.0, -INF, 1e4, -1e4, 1000.0, 1000.5])
)


@settings(max_examples=300, deadline=None)
@given(st.lists(logit, min_size=1, max_size=40), st.data())
def test_identities(logits, data):
    target = data.draw(st.integers(0, len(logits) - 1))
    if max(logits) == -INF:
        return
    found = {name: float(value[0]) for name, value in ours([logits], [target]).items()}
    truth = references.token_stats(np.array(logits, np.float32), target)
    assert (found["rank"] == 1) == (found["log_mass_rank"] == 0)
    assert found["rank"] == truth["rank"] and found["n_tie"] == truth["n_tie"]
    assert found["log_mass_rank"] >= found["logprob"] - 1e-5 * max(1, abs(found["logprob"]))
    assert 0 <= found["entropy"] <= math.log(len(logits)) + 1e-6
    assert found["logprob"] <= 0
    for name in ("logprob", "log_mass_rank", "entropy"):
        assert found[name] == pytest.approx(truth[name], rel=1e-4, abs=1e-5), name
    z = np.array(logits, np.float64)
    q = np.exp(z - z.max())
    mass_above = (q / q.sum())[z > z[target]].sum()
    assert mass_above + math.exp(found["log_mass_rank"]) == pytest.approx(1, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(-3, 3), st.integers(2, 30), st.integers(0, 10_000))
def test_an_offset_changes_nothing_but_rounding(offset, size, seed):
    z = np.random.default_rng(seed).normal(0, 3, (1, size)).round(3)
    a, b = ours(z, [0]), ours(z + 256.0 * offset, [0])
    for name in CORE:
        assert a[name][0] == pytest.approx(b[name][0], rel=1e-3, abs=1e-3), name


def test_concatenate_keeps_order():
    parts = [TokenStats(rank=torch.tensor([1, 2])), TokenStats(rank=torch.tensor([3]))]
    assert TokenStats.concatenate(parts).rank.tolist() == [1, 2, 3]
