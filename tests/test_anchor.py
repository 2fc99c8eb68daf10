"""--anchor k3: its value and gradient against autograd of the formula in float64, whole training
with it, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from prift import loss as loss_module
from prift.anchor import k3
from prift.errors import MissingPrior, OptionError
from prift.heads import Head
from prift.loss import weighted_loss
from prift.methods import METHODS, weigher
from prift.stats import token_stats
from prift.training_data import TrainOptions, load_data
from prift.watch import StepGuard
from tests import cli_fixtures as cli
from tests import cutting, references
from tests.lab import Lab
from tests.refiled import refile, rows_of, values_of
from tests.test_cutting import assert_equal, two_ranks
from tests.test_fused import TORCHS, needs_torchs
from tests.test_guard import guarded
from tests.test_loss import case, check, naive

FLAGS = "--max_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 4"
PULL = {"anchor": "k3", "anchor_weight": 0.5}


def test_by_hand():
    """q = 1/2 and p = 1/4: d = log 2, k3 = 2 - log 2 - 1 = 0.3069, q / p - 1 = 1."""
    value, slope = k3(torch.tensor([0.5, 0.25]).log(), -torch.tensor([0.25, 0.25]).log())
    assert value.tolist() == pytest.approx([0.30685282, 0], abs=1e-7)
    assert slope.tolist() == pytest.approx([1, 0], abs=1e-7)


def test_value_and_slope_over_all_ratios():
    """To the rounding of float32, in which they are returned; near 0 as well as far."""
    nll = torch.tensor([0.0, 1e-6, 0.3, 2.0, 9.0, 19.5], dtype=torch.float32)
    logprob = -torch.tensor([0.0, 1e-5, 0.1, 0.3, 5.0, 60.0], dtype=torch.float32)
    q, n = (x.flatten() for x in torch.meshgrid(logprob, nll, indexing="ij"))
    value, slope = k3(q, n)
    wanted = [references.k3(*pair) for pair in zip(q.tolist(), (-n).tolist(), strict=True)]
    np.testing.assert_allclose(value, wanted, rtol=2**-23, atol=1e-15)
    ratios = [math.expm1(a + b) for a, b in zip(q.tolist(), n.tolist(), strict=True)]
    np.testing.assert_allclose(slope, ratios, rtol=2**-23)


def test_where_the_model_gave_a_token_up_the_pull_stays_finite():
    """Beyond d = 20 the value is a tangent: no step downwards, no overflow."""
    nll = torch.tensor([19.999, 20.0, 20.001, 100.0, 1e4])
    value, slope = k3(torch.zeros(5), nll)
    assert (value[1:] > value[:-1]).all() and value.isfinite().all()
    assert float(slope[2]) == float(slope[4]) == pytest.approx(math.expm1(20), rel=1e-6)
    more = float(value[4].double() - value[3].double())
    assert more == pytest.approx(9900 * math.expm1(20), rel=1e-5)


def test_tokens_without_a_chance_are_not_anchored():
    value, slope = k3(torch.tensor([-torch.inf, -300.0]), torch.tensor([2.0, 2.0]))
    assert value.tolist() == [0, 297] and slope.tolist() == [0, -1]


SOURCES = {
    "sft": ("uniform", None),
    "prior": ("prob", "prior"),
    "sparse": ("mass", "prior"),
    "online": ("prob", "online"),
    "statistics": ("mass", "online"),
    "compares": ("iw-sft", "online"),
    "batch": ("self-reference", "online"),
}


@pytest.mark.parametrize("kernel", [None, pytest.param(TORCHS, marks=needs_torchs)])
@pytest.mark.parametrize("name", SOURCES)
def test_loss_and_gradients_are_those_of_the_formula(name, kernel, monkeypatch):
    """Autograd of sum(w * scale * nll) + factor * sum(k3); every row is run, weight or not."""
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", (1, 7))
    hidden, weight, bias, targets = case(40, seed=5)
    scale, factor = torch.rand(40) + 0.5, 0.3
    with torch.no_grad():
        z = hidden @ weight.T + bias
        needed = weigher(*SOURCES[name], {}).needs
        prior = token_stats(z + torch.randn(z.shape), targets, tuple(needed))
        prior = replace(prior, logprob=prior.logprob.clone())
        prior.logprob[7] = -torch.inf
    chosen = weigher(*SOURCES[name], {})

    def weights(z, y):
        own = token_stats(z.float(), y, tuple(chosen.needs)) if chosen.source == "online" else prior
        return chosen(own, None, prior).expand(40) * scale

    head = Head(weight, bias)
    ours = weighted_loss(
        hidden, head, targets, chosen, prior, scale_N=scale, anchor=factor, kernel=kernel
    )
    expected = naive(
        hidden, weight, bias, targets, weights, anchor=(factor, prior.logprob.double())
    )
    plain = naive(hidden, weight, bias, targets, weights)
    assert abs(float(expected[0] - plain[0])) > 1e-2 * float(plain[0])
    check(hidden, weight, bias, targets, ours, expected, 1e-5)
    torch.testing.assert_close(ours.nll.double(), expected[1], rtol=1e-5, atol=1e-5)
    rule = weights(hidden @ weight.T + bias, targets) / scale
    torch.testing.assert_close(ours.weights, rule.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("accumulation", "packed"), [(1, False), (2, False), (2, True)])
def test_training_with_an_anchor_is_the_naive_training(tmp_path, method, accumulation, packed):
    """Nothing is cut; a batch without any weight is anchored all the same, and its step taken."""
    ours = cutting.run(tmp_path, method, accumulation, packed=packed, anchored=True)
    assert_equal(ours, method, accumulation, anchored=True)
    tokens = [list(map(len, cutting.KEPT[i : i + 2])) for i in range(0, 6 * accumulation, 2)]
    assert ours["shapes"] == [(1, sum(n)) if packed else (2, max(n)) for n in tokens]


@pytest.mark.parametrize("normalize", ["kept", "weights", "sequence"])
def test_the_anchor_is_a_mean_over_label_tokens_whatever_the_rule_is_divided_by(
    tmp_path, normalize
):
    """With one batch a step, the third has nothing kept: what is left is the anchor."""
    ours = cutting.run(tmp_path, "prift-prob", 1, normalize=normalize, anchored=True)
    assert_equal(ours, "prift-prob", 1, normalize=normalize, anchored=True)


@pytest.mark.parametrize("method", ["dft", pytest.param("prift-mass", marks=pytest.mark.slow)])
def test_two_ranks_are_anchored_as_one(tmp_path, method):
    ours = two_ranks(tmp_path, method, 1, "weights" if method == "prift-mass" else "", "anchored")
    normalize = "weights" if method == "prift-mass" else "tokens"
    assert_equal(ours, method, 2, ranks=2, normalize=normalize, anchored=True)


def test_metrics_and_evaluation(lab):
    """Exact over any batches; eval_loss contains the anchor; at the prior itself it is 0."""
    found = []
    flags = "--eval_strategy steps --eval_steps 2 --per_device_eval_batch_size"
    for size in (3, 40):
        name = f"anchor-{size}"
        said = []
        lab.train(
            name, "prift-mass", f"{FLAGS} {flags} {size}", eval_data=(lab.data,), said=said, **PULL
        )
        found.append(next(e for e in lab.history(name) if "eval_anchor" in e))
        assert any("the model agrees with the prior" in line for line in said)
    for key in ("eval_loss", "eval_anchor", "eval_nll", "eval_mean_weight"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5), key
    first, second = lab.history("anchor-3")[:2]
    assert first["anchor"] == pytest.approx(0, abs=1e-9) and second["anchor"] > 1e-6
    assert first["zero_share"] > 0 and "nll" in first and "nll" in second

    lab.train("bare", "prift-mass", f"{FLAGS} {flags} 3", eval_data=(lab.data,))
    assert not any("anchor" in key for entry in lab.history("bare") for key in entry)


def test_the_loss_of_evaluation_has_the_anchor_in_it(lab):
    flags = f"{FLAGS} --learning_rate 1e-2 --eval_strategy steps --eval_steps 2"
    lab.train("eval-loss", "sft", flags, eval_data=(lab.data,), **PULL)
    (found,) = [e for e in lab.history("eval-loss") if "eval_loss" in e]
    assert found["eval_anchor"] > 0.02
    wanted = found["eval_nll"] + 0.5 * found["eval_anchor"]
    assert found["eval_loss"] == pytest.approx(wanted, rel=1e-6)


def test_nothing_is_cut_where_every_token_is_anchored(lab):
    config = tf.AutoConfig.from_pretrained(lab.model)
    cut = []
    for more in ({}, PULL):
        chosen = weigher("mass", "prior", {})
        options = TrainOptions(lab.model, "out", lab.spec(), chosen, cache=lab.cache, **more)
        data = load_data(options, Path(lab.model), config, lambda line: None)
        cut.append((data.training.lengths < data.training.examples.lengths).any())
        assert options.skips_rows == (not more)
        data.close()
    assert cut == [True, False]


def test_the_check_before_the_first_step_covers_a_prior_that_only_the_anchor_reads(lab):
    for more in ({}, PULL):
        said = []
        lab.train(f"checked{len(more)}", "sft", FLAGS, said=said, **more)
        assert any("agrees with the prior" in line for line in said) == bool(more)


def test_a_pull_keeps_the_model_near(lab):
    drifts = []
    for weight in (0.0, 3.0):
        more = {"anchor": "k3", "anchor_weight": weight}
        lab.train(f"near-{weight}", "sft", f"{FLAGS} --max_steps 12", **more)
        drifts.append(lab.history(f"near-{weight}")[11])
    assert drifts[1]["anchor"] < 0.5 * drifts[0]["anchor"]
    assert 0 < drifts[1]["drift"] < drifts[0]["drift"]


def test_a_weight_of_zero_only_measures(lab):
    lab.train("plain", "dft", FLAGS)
    lab.train("measured", "dft", FLAGS, anchor="k3", anchor_weight=0.0)
    for one, other in zip(lab.history("plain")[:2], lab.history("measured")[:2], strict=True):
        assert {**one, "anchor": other["anchor"]} == other


def test_steps_are_taken_for_the_anchors_sake(tmp_path):
    """Whether a step without weight is passed over."""
    chosen, model = weigher("uniform", None, {}), torch.nn.Linear(2, 2)
    for anchored in (False, True):
        guard = StepGuard(chosen, anchored=anchored)
        guard.see(torch.ones(()), torch.zeros(3), str)
        guarded(guard, tmp_path, model)
        assert guard.skipped == (not anchored)


def test_a_cache_that_lacks_rows_is_refused(tmp_path):
    lab = Lab(tmp_path)
    lab.precompute(text={"limit": 30})
    for method in ("sft", "dft"):
        with pytest.raises(MissingPrior, match="10 of 40 sequences have no prior"):
            lab.train("out", method, FLAGS, **PULL)
    with pytest.raises(OptionError, match="--anchor k3 reads the prior: name a cache"):
        lab.train("out", "sft", FLAGS, cache=None, **PULL)


def test_tokens_without_anchor_are_counted_aloud_and_spoil_nothing(lab, tmp_path):
    """The first label token of each of five examples has no chance under the prior."""
    keys, _, runs = rows_of(lab)
    values = values_of(lab.cache, keys, runs)
    for row in values[:5]:
        row["logprob"][0] = row["log_mass_rank"][0] = -np.inf
    said, steps = [], "--max_steps 1 --per_device_train_batch_size 40"
    lab.train(
        "excluded", "sft", steps, cache=refile(lab, tmp_path, values), skip_check=True, said=said,
        **PULL,
    )  # fmt: skip
    assert "training: 5 label tokens have no chance under the prior, and no anchor" in said
    first = lab.history("excluded")[0]
    assert first["anchor"] == pytest.approx(0, abs=1e-9)  # of the others: the prior's own model
    assert first["loss"] == pytest.approx(first["nll"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--anchor", "k3"), "--anchor k3 needs --anchor-weight L"),
        (("--anchor-weight", "0.1"), "--anchor-weight 0.1 needs --anchor k3"),
        (("--anchor", "k3", "--anchor-weight", "-1"), "--anchor-weight -1: wanted a finite factor"),
        (("--anchor", "k3", "--anchor-weight", "nan"), "--anchor-weight nan: wanted a finite"),
        (("--anchor", "k3", "--anchor-weight", "inf"), "--anchor-weight inf: wanted a finite"),
    ],
)
def test_options_that_make_no_anchor(model, data, tmp_path, words, message):
    cli.refused(cli.train(model, data, tmp_path / "out", *words), message)
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(model, data, tmp_path):
    cache, words = tmp_path / "cache", ("--anchor", "k3", "--anchor-weight", "0.05", "--json")
    cli.succeeded(cli.precompute(model, data, cache))
    done = cli.train(model, data, tmp_path / "out", "--cache", cache, *words)
    cli.succeeded(done)
    assert "anchor" in json.loads(done.stdout)["metrics"]
    other = cli.train(model, data, tmp_path / "out", "--cache", cache, *words[:3], "1", "--resume")
    cli.refused(other, "anchor_weight 0.05, not 1.0")


def test_an_anchor_and_a_normaliser_of_another_kind():
    with pytest.raises(OptionError, match="unknown --normalize 'x'. There are: tokens, kept"):
        TrainOptions("m", "out", None, weigher("uniform", None, {}), normalize="x")
    with pytest.raises(OptionError, match="unknown anchor 'k1'. There is: k3"):
        TrainOptions("m", "out", None, weigher("uniform", None, {}), anchor="k1", anchor_weight=1)
