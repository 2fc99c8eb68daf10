"""What holds of rules whatever the tokens: order, scope, and the losses they are gradients of."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.rules import largest
from prift.stats import TokenStats
from prift.weigher import RULES
from tests.rule_cases import chosen, pair, roles, stats_of, weigh

seeds = st.integers(0, 10_000)
few = settings(max_examples=10, deadline=None)
fewer = settings(max_examples=4, deadline=None)

# rule, option, its range, and whether more of it gives more weight or less to every token
MONOTONE = [
    ("mass", "threshold", (0, 1), -1),
    ("threshold", "low", (0, 1), -1),
    ("threshold", "high", (0.1, 1), 1),
    ("prob-threshold", "low", (0, 1), -1),
    ("prob-threshold", "high", (0, 1), 1),
    ("prob", "power", (0, 10), -1),
    ("wit", "prompt", (0, 2), 1),
    ("wit", "response", (0, 2), 1),
    ("focal", "gamma", (0, 10), -1),
    ("rank", "most", (1, 50), 1),
    ("entropy", "low", (0, 4), -1),
    ("entropy", "high", (0, 4), 1),
    ("eaft-full", "alpha", (0, 5), -1),
    ("talr", "floor", (0, 1), 1),
    ("self-reference", "keep", (0, 1), 1),
    ("rho-1", "keep", (0, 1), 1),
    ("token-cleaning", "keep", (0, 1), 1),
    ("iw-sft", "high", (0.2, 5), 1),
    ("psft", "high", (0, 5), 1),
    ("pear", "discount", (0.01, 1), 1),
    ("iw-sft-sequence", "most", (0, 20), 1),
]


@pytest.mark.parametrize(("name", "option", "ends", "sign"), MONOTONE)
@few
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_monotone(name, option, ends, sign, seed, a, b):
    kind = type(RULES[name].options()[option].default)
    values = [kind(ends[0] + x * (ends[1] - ends[0])) for x in sorted((a, b))]
    case = pair(seed, rows=20)
    less, more = (weigh(name, "prior", {option: str(v)}, *case) for v in values)
    assert (sign * (more - less) >= -1e-6).all()


def of(name: str, seed: int, rows: int = 60):
    """The rule, its three arguments, and its weights [N]."""
    z, base, targets, sequence = pair(seed, rows)
    own, other, sequence_N = stats_of(z, targets), stats_of(base, targets), torch.tensor(sequence)
    rule = chosen(name)
    return rule, own, sequence_N, other, rule(own, sequence_N, other, roles(rows)).expand(rows)


def at(rows: torch.Tensor, own: TokenStats, sequence_N: torch.Tensor, base: TokenStats):
    """What a rule sees of some of the 60 tokens of `of`."""
    said = roles(60)[rows]
    return own.map(lambda x: x[rows]), sequence_N[rows], base.map(lambda x: x[rows]), said


@pytest.mark.parametrize("name", RULES)
@fewer
@given(seeds)
def test_weights_are_finite_and_not_negative(name, seed):
    weights = of(name, seed)[-1]
    assert weights.isfinite().all() and (weights >= 0).all()


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n].scope != "sequence"])
@fewer
@given(seeds)
def test_the_order_of_tokens_is_nothing(name, seed):
    rule, own, sequence_N, base, weights = of(name, seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    found = rule(*at(order, own, sequence_N, base)).expand(60)
    torch.testing.assert_close(found, weights[order], rtol=1e-6, atol=0)  # sums in another order


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n].scope == "token"])
@fewer
@given(seeds)
def test_a_rule_of_token_scope_sees_a_token_alone(name, seed):
    rule, own, sequence_N, base, weights = of(name, seed)
    for row in (torch.tensor([17]), torch.arange(0, 60, 7)):
        found = rule(*at(row, own, sequence_N, base)).expand(len(row))
        torch.testing.assert_close(found, weights[row], rtol=1e-6, atol=0)  # exp of other lengths


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n].scope == "sequence"])
@fewer
@given(seeds)
def test_a_rule_of_sequence_scope_sees_a_sequence_alone(name, seed):
    rule, own, sequence_N, base, weights = of(name, seed)
    for one in sequence_N.unique():
        rows = (sequence_N == one).nonzero()[:, 0]
        found = rule(*at(rows, own, sequence_N, base))
        torch.testing.assert_close(found, weights[rows], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n].scope == "batch"])
def test_a_rule_of_batch_scope_needs_them_all(name):
    rule, own, sequence_N, base, weights = of(name, seed=3)
    half = torch.arange(30)
    assert not torch.equal(rule(*at(half, own, sequence_N, base)), weights[half])


@few
@given(st.lists(st.floats(-100, 100, width=32), unique=True), st.floats(0, 1))
def test_the_largest_are_exactly_that_share_where_nothing_ties(scores, share):
    kept = largest(torch.tensor(scores), share).bool().numpy()
    assert kept.sum() == round(share * len(scores))
    scores = np.array(scores)
    if kept.any() and not kept.all():
        assert scores[kept].min() > scores[~kept].max()


def probability(z, targets):
    return z.softmax(1).gather(1, targets[:, None])[:, 0]


LOSSES = [  # the loss of each token that a paper differentiates, from p and q in float64
    ("prob", {"power": "1"}, lambda p, q, stats: 1 - p),
    ("prob", {"power": "3"}, lambda p, q, stats: (1 - p**3) / 3),
    ("prob", {"power": "0.5"}, lambda p, q, stats: (1 - p**0.5) / 0.5),
    ("prob-threshold", {"low": "0.1"}, lambda p, q, stats: (1 - p) * (p >= 0.1)),
    ("prob-threshold", {"high": "0.1"}, lambda p, q, stats: (1 - p) * (p <= 0.1)),
    ("threshold", {"low": "0.1"}, lambda p, q, stats: -p.log() * (p >= 0.1)),
    ("deft", {}, lambda p, q, stats: (1 - p**stats.collision) / stats.collision),
    ("psft", {}, lambda p, q, stats: -torch.minimum(p / q, (p / q).clamp(0.8, 1.28))),
]


@pytest.mark.parametrize(("name", "options", "loss"), LOSSES)
def test_the_gradient_is_that_of_the_loss_it_stands_for(name, options, loss):
    """weight * cross-entropy, the weight a constant, against the loss itself; by autograd."""
    z, base, targets, sequence = pair(seed=5)
    own, other = stats_of(z, targets), stats_of(base, targets)
    weights = chosen(name, "online", options)(own, torch.tensor(sequence), other)
    y = torch.tensor(targets)
    truth, ours = (torch.tensor(z, dtype=torch.float64, requires_grad=True) for _ in range(2))
    q = probability(torch.tensor(base, dtype=torch.float64), y)
    loss(probability(truth, y), q, own.map(torch.Tensor.double)).sum().backward()
    nll = torch.nn.functional.cross_entropy(ours, y, reduction="none")
    (weights.double() * nll).sum().backward()
    assert (weights > 0).sum() > 10 and truth.grad.abs().max() > 0.01
    # the weights are float32: see CLOSE in test_rules.py
    torch.testing.assert_close(ours.grad, truth.grad, rtol=2e-5, atol=2e-6)
