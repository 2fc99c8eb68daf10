"""Rules by hand: numbers that can be checked on paper, and the ends of their ranges."""

import math

import numpy as np
import pytest
import torch

from prift.roles import ROLES
from prift.rules import largest
from prift.stats import TokenStats
from prift.weigher import RULES
from tests.rule_cases import chosen, roles, stats_of

INF = math.inf


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -INF for p in probabilities]


def stats(**values) -> TokenStats:
    kinds = {"rank": torch.int32, "n_tie": torch.int32}
    return TokenStats(
        **{n: torch.tensor(v, dtype=kinds.get(n, torch.float32)) for n, v in values.items()}
    )


LN2 = math.log(2)
FIVE = stats(logprob=logs(0.1, 0.5, 0.9, 0.2, 0.3))
HALVES = stats(logprob=logs(*[0.5] * 5))

# rule, options, statistics, base, sequences, expected
EXAMPLES = [
    ("uniform", {}, stats(), None, None, 1),
    ("prob", {}, stats(logprob=logs(0.25, 1)), None, None, [0.25, 1]),
    ("prob", {"power": "2"}, stats(logprob=logs(0.25, 1)), None, None, [0.0625, 1]),
    ("mass", {}, stats(logprob=logs(0.1, 0.1), log_mass_rank=logs(0.4999, 0.5), n_tie=[1, 1]),
     None, None, [0, 1]),
    ("threshold", {}, stats(logprob=logs(0.05, 0.125, 0.5)), None, None, [0, 1, 1]),
    # the bounds themselves are kept
    ("threshold", {"low": "0.125", "high": "0.25"}, stats(logprob=logs(0.05, 0.125, 0.25, 0.5)),
     None, None, [0, 1, 1, 0]),
    ("prob-threshold", {"low": "0.25"}, stats(logprob=logs(0.05, 0.25, 0.5)), None, None,
     [0, 0.25, 0.5]),
    # 0.5^2, 0.1^2
    ("focal", {}, stats(logprob=logs(0.5, 0.9)), None, None, [0.25, 0.01]),
    ("rank", {}, stats(rank=[1, 10, 11]), None, None, [1, 1, 0]),
    ("entropy", {"low": "0.5", "high": "1.5"}, stats(entropy=[0, 1, 2]), None, None, [0, 1, 0]),
    ("eaft", {}, stats(entropy_top20=[0, 1.5]), None, None, [0, 0.5]),
    ("eaft", {"alpha": "2"}, stats(entropy_top20=[0, 1.5]), None, None, [0, 0.25]),
    ("eaft", {"divisor": "1"}, stats(entropy_top20=[0, 1.5]), None, None, [0, 1.5]),
    ("eaft-full", {}, stats(entropy=[1.5, 6]), None, None, [0.5, 1]),
    # log q + H = 0, -2, 2: g = e^0 = 1, e^2 > 2, e^-2 = 0.13534; w = e^-1, e^(-3 * 2),
    # e^(-0.5 * 0.13534)
    ("idft", {}, stats(logprob=[-1, -3, -0.5], entropy=[1, 1, 2.5]), None, None,
     [0.367879, 0.00247875, 0.934571]),
    # 0^0 = 1
    ("idft", {"low": "0", "high": "0"}, stats(logprob=[-INF, -1], entropy=[1, 1]), None, None,
     [1, 1]),
    # 0.25^0.5, 0.25^1
    ("deft", {}, stats(logprob=logs(0.25, 0.25), collision=[0.5, 1]), None, None, [0.5, 0.25]),
    # mean 0.75, f = 0.375; a = 0.375 + 0.625 * 1 = 1 and 0.375 + 0.625 * (0.5 / 1.5) = 0.583333;
    # 0.5^0.583333
    ("deft-cayley", {}, stats(logprob=logs(1, 0.5)), None, None, [1, 0.667420]),
    # sequence means 2 and 4, median 3: e^(-1/3), e^-1, e^(-4/3)
    ("talr", {}, stats(logprob=[-1, -4, -3]), None, [0, 1, 0], [0.716531, 0.263597, 0.367879]),
    ("talr", {"floor": "0.3"}, stats(logprob=[-1, -4, -3]), None, [0, 1, 0],
     [0.716531, 0.3, 0.367879]),
    # H = 2 bits: s = 4 / 4 + 1 = 2, x = max(3, 2), K = (log2 4)^-2 = 1/4, (0.25 * 2)^(-1/4)
    # = 2^0.25 = 1.189207, a quarter of it
    ("ranktuner", {}, stats(logprob=logs(0.25), rank=[3], entropy=[2 * LN2]), None, None,
     [0.297302]),
    ("ranktuner", {"factor": "one"}, stats(logprob=logs(0.25), rank=[3], entropy=[2 * LN2]), None,
     None, [1.189207]),
    # g(1) = 1 / log2 2 = 1, g(3) = 1 / log2 4 = 1/2: 2^(1 - 1/2) = 1.414214, a quarter of it
    ("ranktuner-exact", {}, stats(logprob=logs(0.25), rank=[3], expected_rank=[1]), None, None,
     [0.353553]),
    # 0.7 * 4 = 2.8, so three of four: the first three by loss, the last three by entropy
    ("self-reference", {}, stats(logprob=[-1, -2, -3, -4], entropy=[4, 1, 2, 3]), None, None,
     [0, 1, 1, 0]),
    ("self-reference", {"by": "loss", "keep": "0.5"},
     stats(logprob=[-1, -2, -3, -4], entropy=[4, 1, 2, 3]), None, None, [1, 1, 0, 0]),
    # ratios 1, 5, 0.125
    ("iw-sft", {}, stats(logprob=logs(0.5, 0.5, 0.1)), stats(logprob=logs(0.5, 0.1, 0.8)), None,
     [1, 1.8, 0.2]),
    # sequence 3: ratios 4 and 1, mean of logs = log 2; sequence 0: ratio 32
    ("iw-sft-sequence", {}, stats(logprob=logs(0.8, 0.96, 0.5)),
     stats(logprob=logs(0.2, 0.03, 0.5)), [3, 0, 3], [2, 16, 2]),
    # ratios 1.25, 0.5, 2
    ("psft", {}, stats(logprob=logs(0.5, 0.25, 0.5)), stats(logprob=logs(0.4, 0.5, 0.25)), None,
     [1.25, 0.5, 0]),
    # sequence 0 is tokens 0, 2, 3 with log ratios 0.1, 0.2, 1 -> 0.3: the last weighs 1, the one
    # before it 0.999 e^0.3, the first 0.999^2 e^0.5; sequence 7 is token 1 alone
    ("pear", {}, stats(logprob=[-1, -1, -1, -1]), stats(logprob=[-1.1, -2, -1.2, -2]),
     [0, 7, 0, 0], [1.645426, 1, 1.348509, 1]),
    # 0.6 * 5 = 3 with the largest log q - log p: the least likely three
    ("rho-1", {}, FIVE, HALVES, None, [1, 0, 0, 1, 1]),
    # log p - log q: the most likely three
    ("token-cleaning", {}, FIVE, HALVES, None, [0, 1, 1, 0, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "own", "base", "sequence", "expected"), EXAMPLES)
def test_by_hand(name, options, own, base, sequence, expected):
    sequence_N = None if sequence is None else torch.tensor(sequence)
    found = chosen(name, "prior", options)(own, sequence_N, base)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


def test_wit_by_hand():
    said = ["prompt", "response", "system", "user", "assistant", "tool"]
    role_N = torch.tensor([ROLES.index(one) for one in said], dtype=torch.uint8)
    by_hand = {"prompt": "0.25", "response": "2"}
    found = chosen("wit", "prior", by_hand)(stats(), role_N=role_N)
    assert found.tolist() == [0.25, 2, 0.25, 0.25, 2, 0.25]
    assert chosen("wit")(stats(), role_N=role_N).tolist() == [0, 1, 0, 0, 1, 0]


def test_mass_by_hand():
    # q = (0.5, 0.25, 0.25): u is 1, 0.5, 0.5 by the paper; by the authors' code 1, 0.25, 0.25.
    found = stats_of(np.array([logs(0.5, 0.25, 0.25)] * 3, np.float32), [0, 1, 2])
    assert chosen("mass")(found).tolist() == [1, 1, 1]
    assert chosen("mass", "prior", {"ties": "official-code"})(found).tolist() == [1, 0, 0]
    assert chosen("mass", "prior", {"threshold": "0.6"})(found).tolist() == [1, 0, 0]


def test_every_rule_has_an_example():
    assert {name for name, *_ in EXAMPLES} | {"wit"} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_no_token_at_all(name):
    empty = stats_of(np.zeros((0, 5), np.float32), np.zeros(0, int))
    found = chosen(name)(empty, torch.zeros(0, dtype=torch.int64), empty, roles(0))
    assert found.shape in ((0,), ()) and found.dtype == torch.float32


@pytest.mark.parametrize("name", RULES)
def test_one_token(name):
    one = stats_of(np.array([logs(0.5, 0.3, 0.2)], np.float32), [1])
    (weight,) = chosen(name)(one, torch.tensor([4]), one, roles(1)).expand(1).tolist()
    assert 0 <= weight < INF


# q(y) = 0 beside a token of q(y) = 1/2: neither NaN nor, by default, infinite.
IMPOSSIBLE = {
    "uniform": 1, "prob": 0, "mass": 0, "threshold": 0, "prob-threshold": 0, "wit": 0, "focal": 1,
    "rank": 1, "entropy": 1, "eaft": LN2 / 3, "eaft-full": LN2 / 3, "idft": 0, "deft": 0,
    "deft-cayley": 0, "talr": 0.01, "ranktuner": 0, "ranktuner-exact": 0, "self-reference": 0,
    # neither the source nor the base gives it any chance: a ratio of 1
    "iw-sft": 1, "iw-sft-sequence": 1, "psft": 1, "pear": 1, "rho-1": 1, "token-cleaning": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_token_without_any_chance(name):
    both = stats_of(np.array([[0, 0, -INF]] * 2, np.float32), [2, 0])
    # of two tokens, keep one; the impossible one is the worst, or ties
    options = {"keep": "0.5"} if "keep" in RULES[name].options() else {}
    rule = chosen(name, "prior", options)
    found = rule(both, torch.tensor([0, 0]), both, roles(2)).expand(2)
    if name == "pear":  # the last token of a sequence is weighed by no ratio
        assert found.tolist() == pytest.approx([0.999, 1])
        found = found[1:]
    assert found[0].item() == pytest.approx(IMPOSSIBLE[name], rel=1e-6)
    assert found.isfinite().all()


def test_a_token_to_which_one_of_two_gives_no_chance():
    none, some = stats(logprob=[-INF, -1]), stats(logprob=[-1, -1])
    sequence = torch.tensor([0, 1])
    expected = {  # where the source has none, where the base has none
        "iw-sft": (0.2, 1.8), "iw-sft-sequence": (0, 16), "psft": (0, 0), "pear": (1, 1),
        "rho-1": (1, 0), "token-cleaning": (0, 1),
    }  # fmt: skip
    assert set(expected) == {name for name in RULES if RULES[name].base}
    for name, values in expected.items():
        options = {"keep": "0.5"} if "keep" in RULES[name].options() else {}
        rule = chosen(name, "prior", options)
        found = rule(none, sequence, some)[0], rule(some, sequence, none)[0]
        assert torch.stack(found).tolist() == pytest.approx(values), name


def test_ranktuner_without_its_factor_has_no_bound():
    impossible = stats(logprob=[-INF], rank=[3], entropy=[1.0])
    assert chosen("ranktuner", "prior", {"factor": "one"})(impossible).item() == INF


def test_certainty():
    """Rank 1 everywhere, q(y) = 1 and no entropy at all."""
    sure = stats_of(np.array([[1e4, 0, 0]] * 3, np.float32), [0, 0, 0])
    sequence = torch.tensor([0, 0, 1])
    expected = {  # s = 1/4 + 1 and K = log2(2.25)^-2 = 0.730607: 1.25^-K = 0.849565
        "focal": 0, "eaft": 0, "eaft-full": 0, "ranktuner": 0.849565,
    }  # fmt: skip
    for name in set(RULES) - {"pear", "wit"}:
        found = chosen(name)(sure, sequence, sure).expand(3)
        assert found.tolist() == pytest.approx([expected.get(name, 1)] * 3, rel=1e-5), name


def test_talr_with_one_sequence_divides_by_its_own_mean():
    # mean 2: e^(-1/2), e^(-3/2)
    found = chosen("talr")(stats(logprob=[-1, -3]), torch.tensor([5, 5]))
    np.testing.assert_allclose(found, [0.606531, 0.223130], rtol=1e-5)


@pytest.mark.parametrize(
    ("scores", "share", "kept"),
    [
        ([3, 1, 2, 4], 0.5, [1, 0, 0, 1]),
        ([3, 1, 3, 4], 0.5, [1, 0, 1, 1]),  # a tie at the bound is kept whole
        ([3, 1, 2, 4], 0, [0, 0, 0, 0]),
        ([3, 1, 2, 4], 1, [1, 1, 1, 1]),
        ([3, 1, 2, 4], 0.1, [0, 0, 0, 0]),  # 0.4 of a token
        ([-INF, 1, INF], 2 / 3, [0, 1, 1]),
        ([], 0.5, []),
    ],
)
def test_the_largest(scores, share, kept):
    assert largest(torch.tensor(scores), share).tolist() == kept
