"""--normalize: the whole training against the definitions in float64, cut batches and all."""

import json

import numpy as np
import pytest
import torch

from prift.arguments import training_arguments
from prift.errors import OptionError
from prift.normalizers import DENOMINATORS, LateDivision, check_late
from tests import cli_fixtures as cli
from tests import cutting
from tests.test_cutting import assert_equal, two_ranks


def test_denominators_by_hand():
    weights = np.array([0.5, 0.0, -2.0], np.float32)
    found = {name: DENOMINATORS[name](weights) for name in DENOMINATORS}
    own = {"micro-batch": 3, "micro-batch-sum": 3}
    assert found == {"tokens": 3, "kept": 2, "weights": 2.5, "sequence": 1} | own


@pytest.mark.parametrize("method", ["sft", "prift-prob", "prift-mass"])
@pytest.mark.parametrize("normalize", ["kept", "weights", "sequence"])
def test_training_divides_by_what_was_asked_for(tmp_path, method, normalize):
    """Over two micro-batches, one of which has nothing to run."""
    ours = cutting.run(tmp_path, method, 2, normalize=normalize)
    assert_equal(ours, method, 2, normalize=normalize)


@pytest.mark.parametrize("method", ["sft", "dft", "prift-prob", "prift-mass"])
@pytest.mark.parametrize(("accumulation", "anchored"), [(1, False), (2, False), (2, True)])
def test_each_micro_batch_has_its_own_mean(tmp_path, method, accumulation, anchored):
    """Of unequally many label tokens, those cut off among them; one has nothing to run. The anchor
    is a mean over the step's label tokens all the same."""
    more = {"normalize": "micro-batch", "anchored": anchored}
    ours = cutting.run(tmp_path, method, accumulation, **more)
    assert_equal(ours, method, accumulation, **more)
    plain = cutting.naive(method, accumulation, anchored=anchored)["logged"]
    losses = [[entry["loss"] for entry in log] for log in (ours["logged"], plain)]
    assert (np.abs(np.subtract(*losses)) > 5e-5 * np.array(losses[0])).any() == (accumulation > 1)


@pytest.mark.parametrize(("method", "anchored"), [("prift-mass", False), ("dft", True)])
def test_the_means_of_micro_batches_add_up(tmp_path, method, anchored):
    """Two unequal ones a step: gradients and their norm are those of the sum of their means, the
    loss logged is its half."""
    more = {"normalize": "micro-batch-sum", "anchored": anchored}
    ours = cutting.run(tmp_path, method, 2, **more)
    assert_equal(ours, method, 2, **more)


def test_two_ranks_average_the_means_of_their_micro_batches(tmp_path):
    ours = two_ranks(tmp_path, "prift-prob", 1, "micro-batch")
    assert_equal(ours, "prift-prob", 2, ranks=2, normalize="micro-batch")


def test_two_ranks_average_the_sums_of_their_means(tmp_path):
    """Six batches, two a step on each rank; of the second step one is left for each."""
    ours = two_ranks(tmp_path, "prift-prob", 2, "micro-batch-sum")
    exact = cutting.naive("prift-prob", 4, ranks=2, normalize="micro-batch-sum")
    for name in ("loss", "grad_norm"):
        found, wanted = ([e[name] for e in run["logged"][:2]] for run in (ours, exact))
        assert len(found) == 2 and found == pytest.approx(wanted, rel=2e-5)


def test_an_epochs_last_step_may_have_fewer_micro_batches(tmp_path):
    """Six batches, four a step: the second step is the mean of the two that are left."""
    flags = "--max_steps 2"
    ours = cutting.run(tmp_path, "dft", 4, flags, normalize="micro-batch")
    exact = cutting.naive("dft", 4, normalize="micro-batch")
    for name in ("loss", "grad_norm"):
        found, wanted = ([e[name] for e in run["logged"]] for run in (ours, exact))
        assert len(found) == 2 and found == pytest.approx(wanted, rel=2e-5)


def test_a_mean_over_sequences_needs_no_weights_beforehand(tmp_path):
    ours = cutting.run(tmp_path, "dft", 2, normalize="sequence")
    assert_equal(ours, "dft", 2, normalize="sequence")


@pytest.mark.parametrize("normalize", [pytest.param("kept", marks=pytest.mark.slow), "weights"])
def test_two_ranks_divide_by_what_both_have(tmp_path, normalize):
    ours = two_ranks(tmp_path, "prift-prob", 1, normalize)
    assert_equal(ours, "prift-prob", 2, ranks=2, normalize=normalize)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("method", "normalize"),
    [("dft", "weights"), ("online-rank", "kept"), ("online-rank", "weights")],
)
def test_what_is_known_only_after_the_step(tmp_path, method, normalize, accumulation, packed):
    """Losses, gradient norms and parameters, of unequal micro-batches and of a step in which
    nothing is kept."""
    ours = cutting.run(tmp_path, method, accumulation, packed=packed, normalize=normalize)
    assert_equal(ours, method, accumulation, normalize=normalize)
    if (method, accumulation) == ("online-rank", 1):
        assert [e["zero_share"] == 1 for e in ours["logged"]].count(True) == 1


@pytest.mark.parametrize("method", ["dft", pytest.param("online-rank", marks=pytest.mark.slow)])
def test_two_ranks_learn_of_each_other_what_the_step_is_divided_by(tmp_path, method):
    """One micro-batch on each, whose weights differ."""
    ours = two_ranks(tmp_path, method, 1, "weights")
    assert_equal(ours, method, 2, ranks=2, normalize="weights")


def test_the_gradient_is_corrected_before_it_is_clipped(tmp_path):
    """With the weights of dft, about 1/300, the gradient is far larger once it is divided by
    them: a bound that lies between the two decides."""
    flags = "--max_grad_norm 1e-2 --gradient_checkpointing"
    ours = cutting.run(tmp_path, "dft", 2, flags, normalize="weights")
    start = cutting.tiny("llama").state_dict()
    moved = [(p - start[n]).norm() for n, p in ours["parameters"].items()]
    assert all(entry["grad_norm"] > 1e-2 for entry in ours["logged"])
    bound = cutting.STEPS * cutting.RATE * 1e-2
    assert float(torch.stack(moved).norm()) <= bound * 1.001


def test_a_step_without_weight_has_no_direction():
    model = torch.nn.Linear(2, 2)
    (model.weight.sum() + model.bias.sum()).backward()
    late = LateDivision("weights")
    late.see(torch.zeros(5))
    late.see_loss(torch.tensor(0.0))
    assert float(late.finish(model, torch.tensor(5.0), lambda x: x)) == 0
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("flags", "balanced", "anchored", "message"),
    [
        ("--optim lomo", False, False, "--optim lomo steps inside the backward pass"),
        ("--optim galore_adamw_layerwise --optim_target_modules x", False, False, "layerwise"),
        ("", True, False, "the balance loss of experts"),
        ("", False, True, "the anchor, a mean over label tokens"),
    ],
)
def test_where_it_could_not_be_exact_it_is_refused(tmp_path, flags, balanced, anchored, message):
    training, _ = training_arguments(str(tmp_path), {}, flags.split(), False)
    with pytest.raises(OptionError, match=f"--normalize kept is refused here: .*{message}"):
        check_late("kept", training, balanced, anchored)


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    training, _ = training_arguments(str(tmp_path), {}, [], False)
    check_late("kept", training, False, False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(OptionError, match="DeepSpeed clips"):
        check_late("kept", training, False, False)


def test_from_the_command_line(model, data, tmp_path):
    """The loss of dft at its first step: a mean of nll, weighted by the probabilities."""
    logged = {}
    for normalize in ("tokens", "weights"):
        words = ("--method", "dft", "--normalize", normalize, "--", "--logging_steps", "1")
        cli.succeeded(cli.train(model, data, tmp_path / normalize, *words))
        state = json.loads((tmp_path / normalize / "trainer_state.json").read_text())
        logged[normalize] = state["log_history"][0]
    wanted = logged["tokens"]["loss"] / logged["tokens"]["mean_weight"]
    assert logged["weights"]["loss"] == pytest.approx(wanted, rel=1e-5)
    words = ("--method", "dft", "--normalize", "weights", "--anchor", "k3", "--anchor-weight", "1")
    refused = cli.train(model, data, tmp_path / "out", *words)
    cli.refused(refused, "--normalize weights is refused here", "--source prior")


def test_weights_that_need_no_statistics_are_known_before_the_step(model, data, tmp_path):
    """Nothing of a step of plain SFT hangs on what comes after it: it may have an anchor."""
    found = {}
    for normalize in ("tokens", "kept"):
        cache = str(tmp_path / "cache")
        cli.succeeded(cli.prift("precompute", "--model", model, "--data", data, "--cache", cache))
        words = ("--cache", cache, "--method", "sft", "--anchor", "k3", "--anchor-weight", "1")
        words += ("--normalize", normalize, "--json")
        done = cli.train(model, data, tmp_path / normalize, *words)
        cli.succeeded(done)
        found[normalize] = json.loads(done.stdout)["metrics"]["nll"]
    assert found["kept"] == pytest.approx(found["tokens"], rel=1e-6)
