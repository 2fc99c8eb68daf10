"""Every rule against its naive reference and the authors' own numbers, from either source."""

import inspect

import numpy as np
import pytest
import torch

from prift import loss as loss_module
from prift.errors import OptionError
from prift.heads import Head
from prift.loss import weighted_loss
from prift.methods import METHODS, weigher
from prift.stats import TokenStats, token_stats
from prift.weigher import RULES, SOURCES
from tests import references
from tests.rule_cases import ALL, chosen, naive, pair, random_case, roles, stats_of, weigh

OPTIONS = {
    "prob": [{"power": "3"}, {"power": "0.5"}, {"power": "0"}],
    "mass": [{"threshold": "0.3"}, {"threshold": "0.3", "ties": "official-code"}],
    "threshold": [{"low": "0.02", "high": "0.3"}, {"low": "0", "high": "0.05"}],
    "prob-threshold": [{"low": "0.03"}, {"high": "0.05"}, {"low": "0.01", "high": "0.2"}],
    "wit": [{"prompt": "0.25"}, {"prompt": "0.5", "response": "2"}],
    "focal": [{"gamma": "0.5"}, {"gamma": "0"}],
    "rank": [{"most": "3"}, {"most": "1"}],
    "entropy": [{"low": "2.5"}, {"high": "2.5"}, {"low": "2.2", "high": "2.6"}],
    "eaft": [{"alpha": "2"}, {"divisor": "1"}],
    "eaft-full": [{"alpha": "3"}],
    "idft": [{"beta": "2"}, {"low": "0.9", "high": "1.1"}],
    "talr": [{"floor": "0.2"}],
    "ranktuner": [{"factor": "one"}],
    "ranktuner-exact": [{"factor": "one"}],
    "self-reference": [{"by": "loss"}, {"by": "entropy", "keep": "0.5"}, {"keep": "0.25"}],
    "iw-sft": [{"low": "0.5", "high": "3"}],
    "iw-sft-sequence": [{"temperature": "2"}, {"most": "1.1"}],
    "psft": [{"high": "1"}],
    "pear": [
        {"discount": "0.8", "low": "0.3", "high": "1.5"},
        {"least_log": "-1", "most_log": "2", "low": "0"},
    ],
    "rho-1": [{"keep": "0.25"}],
    "token-cleaning": [{"keep": "0.25"}],
}
CASES = [(name, options) for name in RULES for options in [{}, *OPTIONS.get(name, [])]]

# Statistics are float32, log q down to -20: off by 20 * 2^-24 = 1.2e-6, which a power of 3 makes
# 4e-6 of a weight, and 1e-7 of 1 - q.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_rule_equals_its_reference(name, options, source):
    case = pair(seed=11)
    found, expected = weigh(name, source, options, *case), naive(name, options, *case)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("name", RULES)
def test_every_option_is_tried_and_matters(name):
    case, tried = pair(seed=11), OPTIONS.get(name, [])
    assert {option for options in tried for option in options} == set(RULES[name].options())
    usual = naive(name, {}, *case)
    for options in tried:
        assert not np.allclose(naive(name, options, *case), usual)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_case_is_trivial(name, options):
    equal = name == "uniform" or (name, options) == ("entropy", {}) or options.get("power") == "0"
    equal = equal or options.get("gamma") == "0"
    assert equal == (len(np.unique(naive(name, options, *pair(seed=11)))) == 1)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_reads_no_more_than_it_declares(name):
    z, base, targets, sequence = pair(seed=2)
    full = [stats_of(z, targets), torch.tensor(sequence), stats_of(base, targets), roles(120)]
    lean = [
        TokenStats(**{n: getattr(full[0], n) for n in RULES[name].needs}),
        full[1] if "sequence_N" in RULES[name].given() else None,
        TokenStats(**{n: getattr(full[2], n) for n in RULES[name].base}),
        full[3] if "role_N" in RULES[name].given() else None,
    ]
    assert torch.equal(chosen(name, "prior")(*lean), chosen(name, "prior")(*full))
    assert bool(RULES[name].base) == ("base" in RULES[name].given())
    if RULES[name].scope == "sequence":
        assert "sequence_N" in RULES[name].given()


@pytest.mark.parametrize("name", RULES)
def test_prior_and_online_agree_while_the_model_is_the_prior(name, monkeypatch):
    """Weights, loss and gradients, the online model's statistics being made chunk by chunk."""
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", (1, 7))
    torch.manual_seed(3)
    hidden, projection = torch.randn(40, 16), torch.randn(203, 16) * 0.7
    targets, sequence = torch.randint(203, (40,)), torch.randint(5, (40,))
    logits = hidden @ projection.T
    stats = token_stats(logits, targets, ALL)
    base = token_stats(logits + torch.randn(logits.shape) * 0.3, targets, ALL)
    results = []
    for source in SOURCES:
        leaves = [hidden.clone().requires_grad_(), projection.clone().requires_grad_()]
        rule = chosen(name, source)
        said = roles(40)
        known = rule(stats, sequence, base, said).expand(40) if source == "prior" else None
        out = weighted_loss(
            leaves[0], Head(leaves[1]), targets, rule, base,
            weights_N=known, sequence_N=sequence, role_N=said,
        )  # fmt: skip
        out.loss.backward()
        assert not out.weights.requires_grad
        results.append((out.weights, out.loss.detach(), *(leaf.grad for leaf in leaves)))
    for prior, online in zip(*results, strict=True):
        # Both are within float32's rounding of the truth, and so within twice of each other.
        budget = 2 * (CLOSE["rtol"] * prior.norm() + CLOSE["atol"] * prior.numel() ** 0.5)
        assert (online - prior).norm() <= budget


@pytest.mark.parametrize("threshold", ["0", "1"])
def test_mass_at_the_ends(threshold):
    z, targets = random_case(3)
    stats = token_stats(torch.tensor(z), torch.tensor(targets))
    kept = weigher("mass", "prior", {"threshold": threshold})(stats)
    expected = torch.ones(200) if threshold == "0" else (stats.rank == 1).float()
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_authors_own_weights(real_inputs, kind):
    """Numbers printed by wang-kee/PriFT on real logits: prob, mass score, three thresholds, DFT."""
    golden = np.load(real_inputs / "golden" / "official_weights.npz")
    z = torch.tensor(golden["logits"])
    if kind == "bf16":
        z = z.bfloat16().float()
    targets = torch.tensor(golden["targets"]).long()
    stats = token_stats(z, targets)
    for ours in SOURCES:
        weights = weigher("prob", ours, {})(stats).numpy()
        for theirs in ("prob", "dft"):
            np.testing.assert_allclose(weights, golden[f"{kind}_{theirs}"], rtol=0, atol=1e-6)
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


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_papers_own_ties_on_real_logits(real_inputs, kind):
    """Where the paper and its authors' code differ, the paper is followed."""
    golden = np.load(real_inputs / "golden" / "official_weights.npz")
    z, targets = torch.tensor(golden["logits"]), golden["targets"].astype(int)
    if kind == "bf16":
        z = z.bfloat16().float()
    stats = token_stats(z, torch.tensor(targets))
    u = np.array([references.mass_rank(*row) for row in zip(z.numpy(), targets, strict=True)])
    for threshold in (0.3, 0.5, 0.9):
        kept = weigher("mass", "prior", {"threshold": str(threshold)})(stats).numpy()
        sure = np.abs(u - threshold) > 1e-6
        assert (kept == (u >= threshold))[sure].all() and sure.mean() > 0.99
    differ = (stats.n_tie > 1).sum().item()
    assert differ > 100 if kind == "bf16" else differ < 100


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


def test_cuts_are_options_that_decide_which_tokens_are_kept():
    """And every value is one that the rule takes; an option that opens and closes is tried so."""
    seen = {(name, option) for name, rule in RULES.items() for option in rule.cuts}
    assert seen == {
        ("mass", "threshold"), ("rank", "most"), ("entropy", "low"), ("entropy", "high"),
        ("threshold", "low"), ("threshold", "high"),
        ("prob-threshold", "low"), ("prob-threshold", "high"),
    }  # fmt: skip
    case = pair(seed=11)
    for name, option in seen:
        beside = {"low": "0"} if option == "high" else {}
        kept = [
            int(np.count_nonzero(weigh(name, "prior", {**beside, option: str(value)}, *case)))
            for value in RULES[name].cuts[option]
        ]
        assert kept == sorted(kept, reverse=option in ("threshold", "low")), (name, option)
        assert kept[0] != kept[-1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("prob", {"power": "-1"}, "--rule-arg power=-1.0: wanted a finite power of 0 or more."),
        ("prob", {"power": "inf"}, "--rule-arg power=inf: wanted a finite power of 0 or more."),
        ("prob", {"power": "nan"}, "--rule-arg power=nan: wanted a finite power of 0 or more."),
        ("mass", {"threshold": "1.5"}, "threshold=1.5: wanted a probability mass, in [0, 1]."),
        ("threshold", {"low": "-1"}, "low=-1.0: wanted a probability, in [0, 1]."),
        ("threshold", {"high": "0.05"}, "high=0.05: wanted a probability, in [0, 1] and not below"),
        ("wit", {"prompt": "-1"}, "prompt=-1.0: wanted a finite weight of 0 or more."),
        ("wit", {"response": "inf"}, "response=inf: wanted a finite weight of 0 or more."),
        ("rank", {"most": "0"}, "most=0: wanted a rank, 1 or more."),
        ("entropy", {"low": "2", "high": "1"}, "--rule-arg high=1.0 is below low=2.0."),
        ("eaft", {"divisor": "0"}, "divisor=0.0: wanted a finite number of nats above 0."),
        ("idft", {"beta": "0"}, "beta=0.0: wanted a finite temperature above 0."),
        ("idft", {"high": "inf"}, "high=inf: wanted a finite power of 0 or more."),
        ("idft", {"low": "3"}, "low=3.0: wanted a power of 0 or more, not above high."),
        ("talr", {"floor": "2"}, "floor=2.0: wanted a weight, in [0, 1]."),
        ("self-reference", {"keep": "60"}, "keep=60.0: wanted a share, in [0, 1]."),
        ("rho-1", {"keep": "60"}, "--rule-arg keep=60.0: wanted a share, in [0, 1]."),
        ("iw-sft", {"low": "2"}, "--rule-arg high=1.8 is below low=2.0."),
        ("iw-sft-sequence", {"temperature": "nan"}, "temperature=nan: wanted a finite factor."),
        ("pear", {"discount": "0"}, "discount=0.0: wanted a factor above 0, 1 at most."),
        ("pear", {"least_log": "1"}, "--rule-arg most_log=0.3 is below least_log=1.0."),
    ],
)
def test_a_value_out_of_range_is_refused_before_any_token_is_seen(name, options, message):
    with pytest.raises(OptionError) as error:
        weigher(name, "prior", options)
    assert message in str(error.value)
