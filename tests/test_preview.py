"""`prift weigh`: what rules would do to a data set."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prift.errors import CacheError, MissingPrior, OptionError
from prift.methods import weigher
from prift.weigher import Rule, Weigher
from tests import cli_fixtures as cli
from tests.lab import Lab
from tests.preview_references import check_groups, naive, run, weights_of, words


@pytest.mark.parametrize("rule", ["prob", "mass"])
def test_numbers_are_those_of_the_definitions(lab, rule):
    tokens = naive(lab)
    weights = weights_of(tokens, rule)
    found = run(lab, weigher(rule, "prior", {}))
    (one,) = found["rules"]
    assert found["label_tokens"] == len(tokens)
    assert found["examples"] == tokens[-1]["example"] + 1
    nll = -np.array([t["logprob"] for t in tokens])
    assert found["sft_loss"] == pytest.approx(nll.mean(), rel=1e-6)
    assert one["loss"] == pytest.approx((weights * nll).mean(), rel=1e-6)
    assert one["kept_share"] == (weights != 0).mean()
    assert one["mean_weight"] == pytest.approx(weights.mean(), rel=1e-6)
    assert one["learning_rate_factor"] == pytest.approx(1 / weights.mean(), rel=1e-6)
    size = weights.sum() ** 2 / (weights**2).sum()
    assert one["effective_tokens"] == pytest.approx(size, rel=1e-6)
    assert one["effective_share"] == pytest.approx(size / len(weights), rel=1e-6)
    assert sum(one_bin["count"] for one_bin in one["histogram"]) == len(weights)
    for b in one["histogram"]:
        low, high = (np.inf * s if v is None else v for v, s in ((b["from"], -1), (b["to"], 1)))
        if low == high:
            assert b["count"] == (weights == low).sum()
        else:
            inside = (weights >= low) & (weights < high) & (weights != 0) & (weights != 1)
            assert b["count"] == inside.sum()
    check_groups(
        one["lengths"],
        lambda group, token: group["from"] <= token["length"] < (group["to"] or np.inf),
        tokens,
        weights,
    )
    assert len(one["lengths"]) > 1


@pytest.mark.parametrize("rule", ["prob", "mass"])
def test_tokens_shown_are_the_most_and_least_weighted(lab, rule):
    tokens = naive(lab)
    weights = weights_of(tokens, rule)
    (one,) = run(lab, weigher(rule, "prior", {}), tokens=5)["rules"]
    by_place = {(t["where"], t["position"]): (t, w) for t, w in zip(tokens, weights, strict=True)}
    for name, ordered in (("least", np.sort(weights)), ("most", -np.sort(-weights))):
        shown = one[name]
        assert [t["weight"] for t in shown] == pytest.approx(ordered[:5].tolist(), rel=1e-6)
        assert len({(t["where"], t["position"]) for t in shown}) == 5
        for t in shown:
            right, weight = by_place[t["where"], t["position"]]
            assert (t["token"], t["logprob"]) == (right["text"], right["logprob"])
            assert t["weight"] == pytest.approx(weight, rel=1e-6)


def test_context_is_the_text_around_the_token(lab):
    rows = [json.loads(line) for line in Path(lab.data).read_text().splitlines()]
    (one,) = run(lab, weigher("prob", "prior", {}), tokens=20)["rules"]
    for token in one["most"] + one["least"]:
        row = rows[int(token["where"].rpartition(":")[2]) - 1]
        whole = row["prompt"] + row["response"]
        around = token["before"] + token["token"] + token["after"]
        assert around.removesuffix("<|endoftext|>") in whole
        assert token["before"]
    assert run(lab, weigher("prob", "prior", {}), tokens=0)["rules"][0]["most"] == []
    everything = run(lab, weigher("prob", "prior", {}), tokens=10**6)
    assert len(everything["rules"][0]["most"]) == everything["label_tokens"]


def test_thresholds_are_compared(lab):
    tokens = naive(lab)
    (chart,) = run(lab, weigher("prob", "prior", {}))["thresholds"]
    assert (chart["rule"], chart["option"], chart["of"]) == ("mass", "threshold", "mass")
    shown = chart["values"]
    assert [one["value"] for one in shown] == [i / 10 for i in range(1, 10)]
    for one in shown:
        u = np.array([t["u"] for t in tokens])
        assert (abs(u - one["value"]) > 1e-6).all()
        assert one["kept_share"] == one["mean_weight"] == (u >= one["value"]).mean()
    assert shown[0]["kept_share"] > shown[-1]["kept_share"]


def test_each_option_that_decides_what_is_kept_is_compared(lab):
    """Whatever rule has it, alone and in a product; the value given is among those compared, and
    mixes and least weights, which keep every token, are left out."""
    tokens = naive(lab)
    q = np.array([t["prob"] for t in tokens])
    product = weigher("threshold*prob", "prior", {"low": "0.03", "high": "0.8"}, mix=0.5)
    asked = (product, weigher("mass", "prior", {}), weigher("mass", "prior", {"threshold": "0.3"}))
    shown = run(lab, *asked)["thresholds"]
    named = [(chart["rule"], chart["of"], chart["option"]) for chart in shown]
    assert named == [
        ("threshold*prob", "threshold", "low"),
        ("threshold*prob", "threshold", "high"),
        ("mass", "mass", "threshold"),  # once, for both
    ]
    low, high = shown[:2]
    assert low["arguments"] == [{"high": 0.8}, {}] and high["arguments"] == [{"low": 0.03}, {}]
    assert {row["value"] for row in low["values"]} == {
        0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7
    }  # fmt: skip
    for row in low["values"]:
        kept = (q >= row["value"]) & (q <= 0.8)
        assert row["kept_share"] == pytest.approx(kept.mean())
        assert row["mean_weight"] == pytest.approx((q * kept).mean(), rel=1e-6)
    for row in high["values"]:  # none below 0.03
        kept = (q <= row["value"]) & (q >= 0.03)
        assert row["value"] > 0.03 and row["kept_share"] == pytest.approx(kept.mean())


def test_weights_that_are_bounded_are_compared_as_bounded(lab):
    """Without --max-weight they would not be finite, and refused."""

    q = np.array([t["prob"] for t in naive(lab)])
    some = tuple(float(np.sort(q)[-n : -n + 2].mean()) for n in (5, 10, 20))  # between two tokens

    def steep(stats, *, low=1.0):
        return torch.where(stats.logprob.exp() >= low, torch.inf, 0.0)

    rule = Rule("steep", ("logprob",), steep, cuts={"low": some})
    (chart, _) = run(lab, replace(Weigher.of(rule, "prior"), most=2.0))["thresholds"]
    for row in chart["values"]:
        assert row["mean_weight"] == pytest.approx(2 * (q >= row["value"]).mean(), rel=1e-6)
    assert [row["mean_weight"] > 0 for row in chart["values"]] == [True] * 3 + [False]


def test_values_asked_for_are_compared(lab):
    rule, asked = weigher("prob*focal", "prior", {"gamma": "1"}), {"power": ["2", "0.5"]}
    power, mass = run(lab, rule, thresholds=asked)["thresholds"]
    q = np.array([t["prob"] for t in naive(lab)])
    assert (power["of"], power["option"], mass["rule"]) == ("prob", "power", "mass")
    for row, value in zip(power["values"], (2.0, 0.5), strict=True):
        assert row["value"] == value
        assert row["mean_weight"] == pytest.approx((q**value * (1 - q)).mean(), rel=1e-5)
    ties = {"ties": ["paper", "official-code"]}
    (_, chart) = run(lab, weigher("mass", "prior", {}), thresholds=ties)["thresholds"]
    assert [row["value"] for row in chart["values"]] == ["paper", "official-code"]
    for values, message in [
        ({"nope": ["1"]}, "--thresholds nope: prob.focal, mass has no such option"),
        ({"gamma": ["-1"]}, "gamma=-1.0: wanted a finite power"),
        ({"power": ["two"]}, "rule prob: power=two is not a float"),
    ]:
        with pytest.raises(OptionError, match=message):
            run(lab, rule, thresholds=values)


def test_rules_run_on_one_thread_and_give_the_others_back(lab):
    seen = set()

    def spying(stats):
        seen.add(torch.get_num_threads())
        return stats.logprob.exp()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(lab, Weigher.of(Rule("spying", ("logprob",), spying), "prior"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


def test_nothing_kept_and_plain_sft(lab):
    none = weigher("rank", "prior", {"most": "1"}, most=0.0)
    nothing, plain = run(lab, none, weigher("uniform", None, {}))["rules"]
    assert (nothing["kept_share"], nothing["mean_weight"], nothing["effective_tokens"]) == (0, 0, 0)
    assert nothing["learning_rate_factor"] is None and nothing["loss"] == 0
    assert {group["share_of_weight"] for group in nothing["lengths"]} == {None}
    assert (plain["mean_weight"], plain["effective_share"]) == (1, 1)
    assert [(b["from"], b["to"]) for b in plain["histogram"] if b["count"]] == [(1, 1)]


def test_what_the_prior_does_not_decide_is_refused(lab):
    for chosen, options, kind, message in [
        (weigher("prob", "online", {}), {}, OptionError, "can be known before training"),
        (weigher("psft", "prior", {}), {}, OptionError, "compares two priors"),
        (weigher("deft", "prior", {}), {}, MissingPrior, "no collision .*\n.*--statistics"),
        (weigher("prob", "prior", {}), {"prior": "0" * 16}, CacheError, "holds no prior"),
        (weigher("prob", "prior", {}), {"tokens": -1}, OptionError, "--tokens -1"),
    ]:
        with pytest.raises(kind, match=message):
            run(lab, chosen, **options)


def test_data_that_were_not_scored_are_refused_with_the_command(tmp_path):
    lab = Lab(tmp_path, rows=5)
    lab.precompute(text={"limit": 2})
    with pytest.raises(
        MissingPrior, match=r"3 of 5 sequences have no prior .*\n  prift precompute"
    ):
        run(lab, weigher("prob", "prior", {}))


RULE = {
    "rule", "arguments", "mix", "min_weight", "max_weight", "kept_share", "mean_weight",
    "effective_tokens", "effective_share", "loss", "learning_rate_factor", "histogram", "lengths",
    "datasets", "files", "roles", "most", "least",
}  # fmt: skip


def test_the_command_as_json(lab):
    more = ["--method", "prift-mass", "--ties", "official-code", "--compare", "prob,power=2"]
    done = cli.prift(*words(lab, *more, "--compare", "uniform", "--tokens", "2", "--json"))
    cli.succeeded(done)
    found = json.loads(done.stdout)
    assert set(found) == {
        "prior", "examples", "tokens", "label_tokens", "sft_loss", "rules", "thresholds"
    }  # fmt: skip
    assert [set(one) for one in found["rules"]] == [RULE] * 3
    named = [(one["rule"], one["arguments"]) for one in found["rules"]]
    assert named == [
        ("mass", [{"ties": "official-code"}]), ("prob", [{"power": 2.0}]), ("uniform", [{}])
    ]  # fmt: skip
    (squared,) = run(lab, weigher("prob", "prior", {"power": "2"}))["rules"]
    assert found["rules"][1]["mean_weight"] == squared["mean_weight"]


def test_each_rule_compared_has_bounds_of_its_own(lab):
    more = ["--rule", "prob", "--mix", "0.1", "--compare", "prob,mix=0.25,min-weight=0.4"]
    more += ["--compare", "prob,power=2,max-weight=0.5", "--compare", "entropy,high=inf"]
    shown = cli.succeeded(cli.prift(*words(lab, *more)))
    for title in ("prob mix=0.1", "prob mix=0.25 min-weight=0.4", "prob power=2.0 max-weight=0.5"):
        assert f"== {title}\n" in shown
    found = json.loads(
        cli.prift(*words(lab, *more, "--json")).stdout,
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    q = np.array([t["prob"] for t in naive(lab)])
    expected = [0.9 * q + 0.1, np.maximum(0.75 * q + 0.25, 0.4), np.minimum(q**2, 0.5)]
    for one, weights in zip(found["rules"], expected, strict=False):
        assert one["mean_weight"] == pytest.approx(weights.mean(), rel=1e-6)
    bounds = [(one["mix"], one["min_weight"], one["max_weight"]) for one in found["rules"]]
    assert bounds[:3] == [(0.1, None, None), (0.25, 0.4, None), (0, None, 0.5)]
    assert found["rules"][3]["arguments"] == [{"high": "inf"}]
    refused = cli.prift(*words(lab, "--rule", "prob", "--compare", "prob,mix=much"))
    cli.refused(refused, "--compare mix=much: wanted a number")
    refused = cli.prift(*words(lab, "--rule", "prob", "--compare", "prob,mix=2"))
    cli.refused(refused, "--mix 2.0: a share is in [0, 1]")


def test_the_command_for_people(lab):
    done = cli.prift(*words(lab, "--rule", "mass", "--mix", "0.2", "--compare", "prob"))
    cli.succeeded(done)
    shown = done.stdout
    found = run(lab, weigher("mass", "prior", {}, mix=0.2))
    mean = found["rules"][0]["mean_weight"]
    for text in (
        "== mass mix=0.2\n",
        "== prob\n",
        f"Its weights average {mean:.4g}",
        f"{1 / mean:.3g} times\nSFT's learning rate",
        "10 to 20 times smaller than SFT's",
        "weights (tokens)\n",
        "weigh most",
        "weigh least",
        "data.jsonl:",
        "\nmass keeps, by threshold\n",
        "\nrole ",
    ):
        assert text in shown, f"{text!r} is not in:\n{shown}"
    assert "████" in shown or "####" in shown


def test_text_of_data_reaches_the_terminal_as_escapes(tmp_path):
    lab = Lab(tmp_path, rows=1)
    row = {"prompt": "red", "response": "\x1b[31m one\ntwo"}
    Path(lab.data).write_text(json.dumps(row) + "\n")
    lab.precompute()
    done = cli.prift(*words(lab, "--rule", "prob"))
    shown = cli.succeeded(done)
    assert "\x1b" not in shown and "\\x1b" in shown and "\\n" in shown


def test_the_command_refuses(lab, tmp_path):
    cli.refused(cli.prift(*words(lab)), "--method NAME, or --rule")
    cli.refused(cli.prift(*words(lab, "--method", "dft")), "can be known before training")
    mass = ["--method", "prift-mass", "--compare"]
    cli.refused(cli.prift(*words(lab, *mass, "nope")), "unknown rule 'nope'")
    cli.refused(cli.prift(*words(lab, *mass, "prob,power")), "--compare power: wanted name=value")
    cli.refused(cli.prift(*words(lab, *mass, "deft")), "no collision", "--statistics")
    config = tmp_path / "run.yaml"
    config.write_text("compare: [os.path:join]\n")
    asked = words(lab, "--method", "prift-mass", "--config", config)
    cli.refused(cli.prift(*asked), "code that would run")
    cli.refused(cli.prift(*asked, "--allow-import"), "os.path:join is no rule")
