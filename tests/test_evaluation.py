"""Evaluation during training, the best model, and TensorBoard."""

import json
from pathlib import Path

import pytest
import safetensors.torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prift.arguments import training_arguments
from tests import cli_fixtures as cli


def arguments(*flags: str):
    return training_arguments("out", {}, flags, has_eval_data=True)[0]


def logged(output: Path, name: str) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_how_often_is_evaluated():
    for flags, strategy, steps in [
        ([], "epoch", None),
        (["--save_strategy", "no"], "epoch", None),  # evaluation data are there to be used
        (["--save_strategy", "best"], "epoch", None),
        (["--save_strategy", "steps"], "steps", 500),
        (["--save_steps", "50"], "steps", 50),
        (["--save_steps", "50", "--eval_steps", "25"], "steps", 25),
        (["--eval_steps", "20"], "steps", 20),
        (["--eval_strategy", "no"], "no", None),
    ]:
        found = arguments(*flags)
        assert found.eval_strategy == strategy, flags
        assert steps is None or found.eval_steps == steps
    assert training_arguments("out", {}, (), has_eval_data=False)[0].eval_strategy == "no"


def test_the_best_model_is_the_one_of_least_nll():
    for flags in (
        ["--load_best_model_at_end"],
        ["--load_best_model_at_end", "--eval_steps", "20"],
        ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "5"],
        ["--save_strategy", "best"],
    ):
        found = arguments(*flags)
        assert found.metric_for_best_model == "nll" and found.greater_is_better is False
    by_share = arguments("--load_best_model_at_end", "--metric_for_best_model", "zero_share")
    assert by_share.metric_for_best_model == "zero_share"
    assert by_share.greater_is_better is True  # as transformers has it


def test_load_best_model_at_end(model, data, tmp_path):
    """A learning rate that ruins the model: the first evaluation is the best, and is kept."""
    out = tmp_path / "out"
    flags = ["--load_best_model_at_end", "--eval_steps", "1", "--max_steps", "3"]
    flags += ["--learning_rate", "1", "--lr_scheduler_type", "constant"]
    cli.succeeded(cli.train(model, data, out, "--eval-data", data, "--", *flags))
    nll = logged(out, "eval_nll")
    assert len(nll) == 3
    best = 1 + nll.index(min(nll))
    assert best < 3, "the last model is the best here, so this shows nothing"
    kept = safetensors.torch.load_file(out / "model.safetensors")
    wanted = safetensors.torch.load_file(out / f"checkpoint-{best}" / "model.safetensors")
    assert all(kept[name].equal(wanted[name]) for name in wanted)


def test_evaluation_measures_all_label_tokens(model, data, tmp_path):
    """drift is 0 at the prior itself; the metrics do not depend on the batch."""
    cache = tmp_path / "cache"
    cli.succeeded(cli.precompute(model, data, cache))
    more = ["--method", "prift-mass", "--cache", cache, "--eval-data", data, "--"]
    found = []
    for size in ("1", "4"):
        flags = ["--eval_on_start", "--max_steps", "1", "--per_device_eval_batch_size", size]
        out = tmp_path / f"out{size}"
        cli.succeeded(cli.train(model, data, out, *more, *flags))
        assert logged(out, "eval_drift")[0] == pytest.approx(0, abs=1e-5)
        found.append(logged(out, "eval_nll")[0])
        assert 0 < logged(out, "eval_zero_share")[0] < 1
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_tensorboard(model, data, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    out = tmp_path / "out"
    flags = ["--report_to", "tensorboard", "--logging_steps", "1"]
    cli.succeeded(cli.train(model, data, out, "--eval-data", data, "--", *flags))
    [file] = out.glob("runs/*/events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    names = set(events.Tags()["scalars"])
    wanted = {"loss", "nll", "nll_kept", "mean_weight", "zero_share", "learning_rate"}
    assert {f"train/{name}" for name in wanted} | {"eval/nll"} <= names
    assert [event.step for event in events.Scalars("train/nll")] == [1, 2]


def test_tensorboard_in_another_folder(model, data, tmp_path, monkeypatch):
    """transformers has no flag for it, but an environment variable."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    flags = ["--report_to", "tensorboard"]
    cli.succeeded(cli.train(model, data, tmp_path / "out", "--", *flags))
    assert list(tmp_path.glob("board/events.*")) and not (tmp_path / "out" / "runs").exists()
