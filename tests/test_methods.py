"""Weighers by name: products of rules, mixes, bounds, options as text, and rules of one's own."""

import itertools
import sys
import textwrap

import pytest
import torch

from prift.errors import OptionError
from prift.methods import weigher
from prift.stats import TokenStats
from prift.weigher import RULES, Rule, Weigher

QUARTERS = TokenStats(
    logprob=torch.tensor([0.25, 0.5, 1.0]).log(), entropy=torch.tensor([2.0, 1.0, 0.0])
)
_names = (f"rules_of_my_own_{i}" for i in itertools.count())  # a module is imported once


def weights(name: str, arguments=None, stats=QUARTERS, **bounds) -> list[float]:
    found = weigher(name, "prior", arguments or {}, **bounds)(stats, torch.tensor([0, 0, 0]))
    return pytest.approx(found.expand(3).tolist(), rel=1e-6, abs=1e-7)


def message(name: str, source="prior", arguments=None, **bounds) -> str:
    with pytest.raises(OptionError) as error:
        weigher(name, source, arguments or {}, **bounds)
    return str(error.value)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of one's own to a folder that Python looks in; gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> str:
        name = next(_names)
        head = "import torch\nfrom prift.weigher import rule\n"
        (tmp_path / f"{name}.py").write_text(head + textwrap.dedent(text))
        return name

    yield write
    for name in [n for n in sys.modules if n.startswith("rules_of_my_own_")]:
        del sys.modules[name]


SIGNED = """
@rule("signed", needs=("logprob",), signed=True)
def signed(stats, *, by: float = 0.5):
    return stats.logprob.exp() - by
"""


def test_the_weights_of_several_rules_are_multiplied():
    # q (1 - q)^2: 0.25 * 0.5625, 0.5 * 0.25, 0
    assert [0.140625, 0.125, 0] == weights("prob*focal")
    assert [0.140625, 0.125, 0] == weights("focal*prob")
    assert [0.25, 0.5, 1] == weights("uniform*prob")
    # 0.25^2 * 0.75, 0.5^2 * 0.5
    assert [0.046875, 0.125, 0] == weights("prob*focal", {"power": "2", "gamma": "1"})


def test_what_a_product_is():
    product = weigher("talr*entropy*iw-sft-sequence", "online", {})
    assert product.name == "talr*entropy*iw-sft-sequence"
    assert product.needs == ("logprob", "entropy") and product.base == ("logprob",)
    assert product.scope == "batch" and product.source == "online" and not product.signed
    assert weigher("prob*pear", "prior", {}).scope == "sequence"
    assert weigher("uniform", "prior", {}).source is None


def test_each_rule_of_a_product_is_given_what_it_asks_for():
    base = TokenStats(logprob=torch.tensor([0.5, 0.5, 0.5]).log())
    found = weigher("prob*iw-sft*talr", "prior", {})(QUARTERS, torch.tensor([0, 0, 1]), base)
    # ratios 0.5, 1, 2 -> 1.8; mean losses 1.5 log 2 and 0, median 0.75 log 2, so that TALR's
    # weights are e^(-2 / 0.75), e^(-1 / 0.75), 1
    expected = [0.25 * 0.5 * 0.0694835, 0.5 * 1 * 0.263597, 1.8]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_an_option_finds_its_rule_alone_or_by_name():
    # 0.25^2 * 0.75^2, 0.5^2 * 0.5^2
    assert [0.0351563, 0.0625, 0] == weights("prob*focal", {"power": "2"})
    assert [0.0351563, 0.0625, 0] == weights("prob*focal", {"prob.power": "2"})
    # threshold keeps from 0.5, entropy from 1
    both = {"threshold.low": "0.5", "entropy.low": "1"}
    assert [0, 1, 0] == weights("threshold*entropy", both)
    said = message("threshold*entropy", arguments={"low": "0.5"})
    assert said == "threshold and entropy both have 'low': say threshold.low=..."


def test_mix_is_a_share_of_plain_sft():
    # 0.7 q + 0.3
    assert [0.475, 0.65, 1] == weights("prob", mix=0.3)
    assert [1, 1, 1] == weights("prob", mix=1.0)
    assert [0.25, 0.5, 1] == weights("prob", mix=0.0)


def test_bounds_hold_after_the_mix():
    assert [0.3, 0.5, 0.9] == weights("prob", least=0.3, most=0.9)
    assert [0.3, 0.5, 1] == weights("prob", least=0.3)
    assert [0.25, 0.5, 0.75] == weights("prob", most=0.75)
    # 0.4, 0.6, 1 of the mix by 0.2
    assert [0.5, 0.6, 0.7] == weights("prob", mix=0.2, least=0.5, most=0.7)
    assert [2, 2, 2] == weights("uniform", least=2.0)


def test_a_scalar_stays_one():
    assert weigher("uniform", None, {}, mix=0.5, most=0.5)(TokenStats()).tolist() == 0.5


def test_negative_weights_are_asked_for(own):
    name = f"{own(SIGNED)}:signed"
    said = message(name)
    assert f"rule {name} may give negative weights" in said
    assert "--allow-negative" in said and "--min-weight 0" in said
    assert [-0.25, 0, 0.5] == weights(name, allow_negative=True)
    assert [0, 0, 0.5] == weights(name, least=0.0)
    assert "negative" in message(name, least=-1.0)
    assert [-0.1, 0, 0.5] == weights(name, least=-0.1, allow_negative=True)
    assert "negative" in message(f"prob*{name}")
    assert weigher(name, "prior", {}, allow_negative=True).signed
    assert not weigher(name, "prior", {}, least=0.0).signed


def test_no_rule_of_prift_is_signed():
    assert not [name for name, rule in RULES.items() if rule.signed]


def test_a_rule_of_ones_own(own):
    before = dict(RULES)
    module = own(
        """
        from typing import Literal

        @rule("prob", needs=("entropy",))
        def calm(stats, *, least: float = 1.5, sense: Literal["low", "high"] = "low",
                 round=False, times: int = 1):
            kept = stats.entropy <= least if sense == "low" else stats.entropy >= least
            return kept.float() * times
        """
    )
    assert [0, 1, 1] == weights(f"{module}:calm")
    found = weigher(f"{module}:calm", "online", {})
    assert (found.name, found.needs, found.source) == (f"{module}:calm", ("entropy",), "online")
    options = {"sense": "high", "least": "1", "times": "3", "round": "true"}
    assert [3, 3, 0] == weights(f"{module}:calm", options)
    assert [0, 0.5, 1] == weights(f"prob*{module}:calm")
    options = {f"{module}:calm.sense": "high", f"{module}:calm.least": "0.5"}
    assert [0.25, 0.5, 0] == weights(f"prob*{module}:calm", options)
    # called like one of prift's, which it neither shadows nor joins
    assert before == RULES
    assert [0.25, 0.5, 1] == weights("prob")


def test_a_rule_whose_annotations_are_text(own, tmp_path):
    module = own("")
    (tmp_path / f"{module}.py").write_text(
        "from __future__ import annotations\nfrom prift.weigher import rule\n"
        "@rule('late', needs=('logprob',))\n"
        "def late(stats, *, times: float = 1.0):\n    return stats.logprob.exp() * times\n"
    )
    assert [0.5, 1, 2] == weights(f"{module}:late", {"times": "2"})


@pytest.mark.parametrize(
    ("text", "function", "expected"),
    [
        (None, "f", "cannot be imported: No module named"),
        ("x = 1", "f", "has no attribute 'f'"),
        ("f = 1", "f", "is no rule: put @prift.weigher.rule(name, needs=...) on it."),
        ("def f(stats): return stats.logprob", "f", "is no rule: put @prift.weigher.rule"),
        ("@rule('f', needs=('logit',))\ndef f(stats): ...", "f",
         "rule f reads 'logit', which is no statistic. There are: logprob, log_mass_rank, rank"),
        ("@rule('f', needs=(), base=('p',))\ndef f(stats, base): ...", "f", "reads 'p'"),
        ("@rule('f', needs=(), scope='row')\ndef f(stats): ...", "f",
         "rule f has the scope 'row'. There are: token, sequence, batch."),
        ("@rule('f', needs=())\ndef f(stats, power=1): ...", "f",
         "rule f takes 'power': a rule is given stats, base, sequence_N and role_N, and all "
         "else is an option behind a *, with a default."),
        ("@rule('f', needs=())\ndef f(stats, *, power): ...", "f", "rule f takes 'power'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_rule_of_ones_own_is_said(own, text, function, expected):
    module = "rules_that_are_not_there" if text is None else own(text)
    said = message(f"{module}:{function}")
    assert expected in said
    if "imported" in said:
        assert said.startswith(f"--rule {module}:{function} cannot be imported: ")
        assert "PYTHONPATH=. prift train" in said


@pytest.mark.parametrize(
    ("name", "source", "arguments", "expected"),
    [
        ("nope", "prior", {}, "unknown rule 'nope'. Rules: uniform, prob, mass"),
        ("prob*nope", "prior", {}, "unknown rule 'nope'."),
        ("prob*", "prior", {}, "unknown rule ''."),
        ("prob*prob", "prior", {}, "--rule prob*prob names prob twice."),
        (":f", "prior", {}, "--rule :f cannot be imported: "),
        ("math:", "prior", {}, "--rule math: cannot be imported: "),
        ("prob", None, {}, "rule prob needs --source prior or --source online."),
        ("prob", "both", {}, "rule prob needs --source prior or --source online."),
        ("uniform*prob", None, {}, "rule uniform*prob needs --source prior or --source online."),
        ("mass", "prior", {"tau": "1"},
         "rule mass has no argument 'tau'. It takes: threshold=0.5, ties=paper."),
        ("uniform", None, {"x": "1"}, "rule uniform has no argument 'x'. It takes: none."),
        ("prob*focal", "prior", {"x": "1"},
         "rule prob has no argument 'x'. It takes: power=1.0.\n"
         "rule focal has no argument 'x'. It takes: gamma=2.0."),
        ("prob*focal", "prior", {"mass.power": "1"}, "rule prob has no argument 'mass.power'."),
        ("prob*focal", "prior", {"focal.power": "1"}, "no argument 'focal.power'."),
        ("mass", "prior", {"threshold": "half"}, "rule mass: threshold=half is not a float."),
        ("rank", "prior", {"most": "1.5"}, "rule rank: most=1.5 is not a int."),
        ("mass", "prior", {"ties": "mine"}, "rule mass: ties=mine is not paper or official-code."),
    ],
)  # fmt: skip
def test_wrong_options_are_named(name, source, arguments, expected):
    assert expected in message(name, source, arguments)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"mix": 1.5}, "--mix 1.5: a share is in [0, 1]."),
        ({"mix": float("nan")}, "--mix nan: a share is in [0, 1]."),
        ({"least": float("inf")}, "--min-weight inf is not a finite weight."),
        ({"most": float("nan")}, "--max-weight nan is not a finite weight."),
        ({"least": 2.0, "most": 1.0}, "--min-weight 2.0 is above --max-weight 1.0."),
    ],
)
def test_wrong_bounds_are_named(bounds, expected):
    assert message("prob", **bounds) == expected


def test_true_or_false(own):
    module = own(
        """
        @rule("f", needs=("logprob",))
        def f(stats, *, double: bool = False):
            return stats.logprob.exp() * (2 if double else 1)
        """
    )
    assert [0.25, 0.5, 1] == weights(f"{module}:f", {"double": "false"})
    assert [0.5, 1, 2] == weights(f"{module}:f", {"double": "true"})
    said = message(f"{module}:f", arguments={"double": "1"})
    assert said == f"rule {module}:f: double=1 is not true or false."


def test_a_weigher_of_one_rule():
    one = Weigher.of(Rule("half", ("logprob",), lambda stats, *, by=0.5: stats.logprob * by),
                     "prior", by=0.25)  # fmt: skip
    assert one(TokenStats(logprob=torch.tensor([4.0]))).tolist() == [1.0]
