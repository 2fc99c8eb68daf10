"""Rules: hand examples, naive references, the authors' own numbers, and option parsing."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.errors import OptionError
from prift.methods import METHODS, weigher
from prift.stats import TokenStats, token_stats
from prift.weigher import RULES
from tests import references


def random_case(seed: int, vocabulary: int = 50, rows: int = 200, ties: bool = True):
    generator = np.random.default_rng(seed)
    z = generator.normal(0, 2, (rows, vocabulary)).astype(np.float32)
    if ties:
        z = z.round(1)  # many exact ties
    return z, generator.integers(0, vocabulary, rows)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_equals_its_reference(name):
    reference = getattr(references, f"weight_{name.replace('-', '_')}")
    z, targets = random_case(1)
    stats = token_stats(torch.tensor(z), torch.tensor(targets))
    found = weigher(name, "prior" if RULES[name].needs else None, {})(stats).expand(len(targets))
    expected = [reference(row, target) for row, target in zip(z, targets, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_reads_no_more_than_it_declares(name):
    z, targets = random_case(2)
    stats = token_stats(torch.tensor(z), torch.tensor(targets))
    lean = TokenStats(**{n: getattr(stats, n) for n in RULES[name].needs})
    source = "prior" if RULES[name].needs else None
    assert torch.equal(weigher(name, source, {})(lean), weigher(name, source, {})(stats))


def test_prob_by_hand():
    stats = TokenStats(logprob=torch.tensor([0.25, 1.0]).log())
    np.testing.assert_allclose(weigher("prob", "prior", {})(stats), [0.25, 1.0], rtol=1e-6)
    squared = weigher("prob", "prior", {"power": "2"})(stats)
    np.testing.assert_allclose(squared, [0.0625, 1.0], rtol=1e-6)


def test_mass_by_hand():
    # q = (0.5, 0.25, 0.25): u is 1, 0.5, 0.5 by the paper; by the authors' code 1, 0.25, 0.25.
    z = torch.tensor([[2.0, 1.0, 1.0]] * 3).log()
    stats = token_stats(z, torch.arange(3))
    assert weigher("mass", "prior", {})(stats).tolist() == [1, 1, 1]
    official = weigher("mass", "prior", {"ties": "official-code"})
    assert official(stats).tolist() == [1, 0, 0]
    assert weigher("mass", "prior", {"threshold": "0.6"})(stats).tolist() == [1, 0, 0]


@pytest.mark.parametrize("threshold", ["0", "1"])
def test_mass_at_the_ends(threshold):
    z, targets = random_case(3)
    stats = token_stats(torch.tensor(z), torch.tensor(targets))
    kept = weigher("mass", "prior", {"threshold": threshold})(stats)
    expected = torch.ones(200) if threshold == "0" else (stats.rank == 1).float()
    assert torch.equal(kept, expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_keeps_more(seed, a, b):
    z, targets = random_case(seed, vocabulary=9, rows=50)
    stats = token_stats(torch.tensor(z), torch.tensor(targets))
    low, high = (weigher("mass", "prior", {"threshold": str(t)})(stats) for t in sorted((a, b)))
    assert (high <= low).all()


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_authors_own_weights(real_inputs, kind):
    """Numbers printed by wang-kee/PriFT on real logits: prob, mass score, three thresholds, DFT."""
    golden = np.load(real_inputs / "golden" / "official_weights.npz")
    z = torch.tensor(golden["logits"])
    if kind == "bf16":
        z = z.bfloat16().float()
    targets = torch.tensor(golden["targets"]).long()
    stats = token_stats(z, targets)
    for ours in ("prior", "online"):
        weights = weigher("prob", ours, {})(stats).numpy()
        for theirs in ("prob", "dft"):
            np.testing.assert_allclose(weights, golden[f"{kind}_{theirs}"], rtol=1e-5, atol=1e-6)
    score = golden[f"{kind}_mass_score"].astype(np.float64)
    thresholds = [k.rpartition("_")[2] for k in golden if k.startswith(f"{kind}_mass_weight_")]
    assert len(thresholds) == 3
    for threshold in thresholds:
        arguments = {"threshold": threshold, "ties": "official-code"}
        kept = weigher("mass", "prior", arguments)(stats).numpy()
        differ = kept != golden[f"{kind}_mass_weight_{threshold}"]
        assert (np.abs(score[differ] - float(threshold)) < 1e-6).all()
        assert differ.mean() < 0.002
    own = stats.log_mass_rank.double().exp() - (stats.n_tie - 1) * stats.logprob.double().exp()
    np.testing.assert_allclose(own.numpy(), score, atol=2e-6)


def test_weights_carry_no_gradient():
    logprob = torch.tensor([-1.0], requires_grad=True)
    assert not weigher("prob", "online", {})(TokenStats(logprob=logprob)).requires_grad


def test_methods_name_rules_that_exist():
    for rule, source in METHODS.values():
        assert weigher(rule, source, {}).name == rule


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_its_formula_and_has_plain_options(name):
    assert "w = " in inspect.getdoc(RULES[name].function)
    assert all(p.default is not p.empty for p in RULES[name].options().values())


@pytest.mark.parametrize(
    ("name", "source", "arguments", "message"),
    [
        ("nope", "prior", {}, "unknown rule 'nope'. Rules: uniform, prob, mass"),
        ("prob", None, {}, "needs --source prior or --source online"),
        ("mass", "prior", {"tau": "1"}, "no argument 'tau'. It takes: threshold=0.5, ties=paper"),
        ("uniform", None, {"x": "1"}, "no argument 'x'. It takes: none"),
        ("mass", "prior", {"threshold": "half"}, "threshold=half is not a float"),
        ("mass", "prior", {"ties": "mine"}, "ties=mine is not paper or official-code"),
    ],
)
def test_wrong_options_are_named(name, source, arguments, message):
    with pytest.raises(OptionError) as error:
        weigher(name, source, arguments)
    assert message in str(error.value)


def test_a_value_out_of_range_is_refused_before_any_token_is_seen():
    with pytest.raises(OptionError, match="threshold=1.5: a probability mass is in"):
        weigher("mass", "prior", {"threshold": "1.5"})
