"""--config files, what follows `--`, and which of the two wins."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import yaml

from prift.arguments import training_arguments
from prift.errors import OptionError
from tests import cli_fixtures as cli


@pytest.fixture
def config(tmp_path):
    """Writes these values (or this text) to a config file; its path."""

    def write(values) -> str:
        text = values if isinstance(values, str) else yaml.safe_dump(values)
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


def arguments(flags=(), config=None, evaluation=False):
    """(TrainingArguments, what the user set)."""
    return training_arguments("out", config or {}, flags, evaluation)


def ran_with(output: Path) -> dict:
    return yaml.safe_load((output / "prift.yaml").read_text())


# --config: options


def test_config_fills_required_options_and_lists(model, data, tmp_path, config):
    second = cli.write_rows(tmp_path / "second.jsonl", cli.ROWS[:1])
    values = {"model": model, "data": [data, second], "data-weight": [1, 2], "limit": 3}
    values |= {"cache": str(tmp_path / "cache"), "dtype": "bfloat16", "json_output": True}
    done = cli.prift("precompute", "--config", config(values))
    cli.succeeded(done)
    assert json.loads(done.stdout)["examples"] == 3 + 2 * 1
    identity = json.loads(next(tmp_path.glob("cache/*/prior.json")).read_text())
    assert identity["dtype"] == "bfloat16"


def test_one_value_serves_a_repeatable_option(model, data, tmp_path, config):
    values = {"model": model, "data": data, "cache": str(tmp_path / "cache")}
    cli.succeeded(cli.prift("precompute", "--config", config(values)))


@pytest.mark.parametrize("place", ["before", "behind"])
def test_command_line_wins(model, data, tmp_path, config, place):
    values = {"model": "absent", "data": ["absent.jsonl"], "limit": 1, "method": "dft"}
    values |= {"full_metrics_steps": 7, "output": str(tmp_path / "not-here")}
    given = ["--model", model, "--data", data, "--output", tmp_path / "out", "--limit", "2"]
    file = ["--config", config(values)]
    words = [*file, *given] if place == "before" else [*given, *file]
    said = cli.succeeded(cli.prift("train", *words, "--", "--max_steps", "1"))
    assert "2 rows -> 2 examples" in said
    assert not (tmp_path / "not-here").exists()
    kept = ran_with(tmp_path / "out")
    assert kept["data"] == [data] and kept["limit"] == 2 and kept["method"] == "dft"
    assert kept["full_metrics_steps"] == 7


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modle": "x"}, ["unknown key 'modle'", "model"]),
        ({"learning_rate": 1}, ["unknown key 'learning_rate'", "training:"]),
        ({"config": "x"}, ["unknown key 'config'"]),
        ({"training_flags": ["--bf16"]}, ["unknown key 'training_flags'"]),
        ({"training": {"learning_rat": 1}}, ["'learning_rat'", "Did you mean learning_rate?"]),
        ({"training": ["--bf16"]}, ["training: found ['--bf16']", "a mapping"]),
        ({"training": {"max_steps": 1.5}}, ["training: ", "max_steps", "1.5"]),
        ({"training": {"max_steps": [1]}}, ["max_steps: found [1]", "a single value"]),
        ({"training": {"bf16": "maybe"}}, ["training: ", "bf16", "maybe"]),
        ({"training": {"output_dir": "x"}}, ["output_dir is not yours to set", "--output"]),
        ({"model": ["a", "b"]}, ["model: found a list"]),
        ({"data": [{"path": "a"}]}, ["data: found {'path': 'a'}"]),
        ("- a\n- b\n", ["wanted a mapping"]),
        ("a: [", ["run.yaml"]),
    ],
)
def test_configs_that_are_refused(model, data, tmp_path, config, values, words):
    cli.refused(cli.train(model, data, tmp_path / "out", "--config", config(values)), *words)
    assert not (tmp_path / "out").exists()


def test_precompute_has_no_training_key(model, data, tmp_path, config):
    done = cli.precompute(model, data, tmp_path, "--config", config({"training": {"bf16": True}}))
    message = cli.refused(done, "unknown key 'training'")
    assert "TrainingArguments" not in message


def test_config_values_of_the_wrong_kind(model, data, tmp_path, config):
    for values, word in [
        ({"limit": 2.5}, "'--limit'"),
        ({"template": "fancy"}, "'--template'"),
        ({"lora_dropout": 2}, "'--lora-dropout'"),
        ({"merge": "perhaps"}, "'--merge'"),
    ]:
        done = cli.train(model, data, tmp_path / "out", "--config", config(values))
        cli.refused(done, word, code=2)
    done = cli.train(model, data, tmp_path / "out", "--config", tmp_path / "absent.yaml")
    cli.refused(done, "absent.yaml", "does not exist", code=2)


# --config: training, and the flags behind --


def test_flags_win_over_the_training_mapping(model, data, tmp_path, config):
    values = {"training": {"learning_rate": 3e-4, "max_steps": 5, "seed": 7}}
    out = tmp_path / "out"
    cli.succeeded(cli.train(model, data, out, "--config", config(values), "--", "--max_steps=1"))
    assert ran_with(out)["training"] == {"learning_rate": 3e-4, "max_steps": 1, "seed": 7}
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    assert state["log_history"][0]["learning_rate"] == pytest.approx(3e-4)


def test_prift_yaml_reproduces_the_run(model, data, tmp_path):
    cache = tmp_path / "cache"
    cli.succeeded(cli.precompute(model, data, cache))
    more = ["--method", "prift-mass", "--cache", cache, "--rule-arg", "threshold=0.25"]
    more += ["--ties", "official-code", "--eval-data", data, "--lora-r", "2", "--lora-alpha", "8"]
    more += ["--max-length", "30", "--full-metrics-steps", "3", "--merge", "--"]
    more += ["--max_steps", "2", "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine"]
    more += ["--lr_scheduler_kwargs", '{"num_cycles": 1}', "--report_to", "tensorboard"]
    first, again = tmp_path / "first", tmp_path / "again"
    cli.succeeded(cli.train(model, data, first, *more))
    cli.succeeded(cli.prift("train", "--config", first / "prift.yaml", "--output", again))
    assert ran_with(again) == {**ran_with(first), "output": str(again)}
    left, right = (safetensors.torch.load_file(f / "model.safetensors") for f in (first, again))
    assert all(left[name].equal(right[name]) for name in left)


def test_secrets_are_not_written_down(model, data, tmp_path):
    more = ["--", "--hub_token", "hf_0123", "--run_name", "mine"]
    cli.succeeded(cli.train(model, data, tmp_path / "out", *more))
    text = (tmp_path / "out" / "prift.yaml").read_text()
    assert "mine" in text and "hf_0123" not in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gradient_checkpointing"], {"gradient_checkpointing": True}),
        (["--bf16", "false"], {"bf16": False}),
        (["--eval_on_start=True"], {"eval_on_start": True}),
        (["--no_dataloader_pin_memory"], {"dataloader_pin_memory": False}),
        (["--no-dataloader-pin-memory"], {"dataloader_pin_memory": False}),
        (["--disable_tqdm", "true"], {"disable_tqdm": True}),
        (["--learning-rate=1e-4"], {"learning_rate": 1e-4}),
        (["--learning_rate", "1", "--learning_rate", "2"], {"learning_rate": 2.0}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--logging_steps", "0.1"], {"logging_steps": 0.1}),
        (["--save_strategy", "no"], {"save_strategy": "no"}),
        (["--optim", "sgd"], {"optim": "sgd"}),
        (["--report_to", "tensorboard"], {"report_to": "tensorboard"}),
        (["--include_for_metrics", "loss", "inputs"], {"include_for_metrics": ["loss", "inputs"]}),
        (["--run_name=--bf16"], {"run_name": "--bf16"}),
        (["--run_name", "a b=c"], {"run_name": "a b=c"}),
        (["--debug", "underflow_overflow"], {"debug": ["underflow_overflow"]}),
        (["--lr_scheduler_kwargs", '{"a": 1}'], {"lr_scheduler_kwargs": '{"a": 1}'}),
        ([], {}),
    ],
)
def test_flags(flags, expected):
    parsed, given = arguments(flags)
    assert given == expected
    assert given == yaml.safe_load(yaml.safe_dump(given))
    assert arguments(config=given)[0].to_dict() == parsed.to_dict()  # as written to prift.yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 5e-5", {"learning_rate": 5e-5}),  # a string to YAML
        ("learning-rate: 1", {"learning_rate": 1.0}),
        ("save_strategy: no", {"save_strategy": "no"}),  # false to YAML
        ("bf16: no", {"bf16": False}),
        ("eval_on_start: 'yes'", {"eval_on_start": True}),
        ("max_steps: 10", {"max_steps": 10}),
        ("max_steps: null", {}),
        ("report_to: [tensorboard]", {"report_to": ["tensorboard"]}),
        ("include_for_metrics: loss", {"include_for_metrics": ["loss"]}),
        ("run_name: 5", {"run_name": "5"}),
        ("lr_scheduler_kwargs: {a: 1}", {"lr_scheduler_kwargs": {"a": 1}}),
    ],
)
def test_training_mapping(text, expected):
    assert arguments(config=yaml.safe_load(text))[1] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nope", "1"], "after --: --nope is not a flag"),
        (["--learning_rat=1"], "Did you mean --learning_rate?"),
        (["--learn", "1"], "--learn is not a flag"),  # no abbreviations
        (["stray"], "'stray' is no flag"),
        (["--bf16", "true", "stray"], "'stray' is no flag"),
        (["--bf16", "maybe"], "--bf16: Truthy value expected"),
        (["--max_steps"], "--max_steps.*expected one argument"),
        (["--learning_rate", "fast"], "--learning_rate.*'fast'"),
        (["--lr_scheduler_type", "step"], "invalid choice: 'step' .*'linear'"),
        (["--logging_steps", "0"], "training arguments: .*logging_steps"),
        (["--output_dir", "x"], "output_dir is not yours to set: it is prift's own --output"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint .*--resume"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--use_liger_kernel"], "use_liger_kernel"),
        (["--remove_unused_columns", "false"], "remove_unused_columns"),
        (["--prediction_loss_only"], "prediction_loss_only"),
        (["--average_tokens_across_devices", "false"], "average_tokens_across_devices"),
        (["--no_average_tokens_across_devices"], "average_tokens_across_devices"),
        (["--load_best_model_at_end"], "load_best_model_at_end needs --eval-data"),
    ],
)
def test_flags_that_are_refused(flags, message):
    with pytest.raises(OptionError, match=message):
        arguments(flags)


def test_refused_flag_on_the_command_line(model, data, tmp_path):
    done = cli.train(model, data, tmp_path / "out", "--", "--label_smoothing_factor", "0.1")
    cli.refused(done, "label_smoothing_factor is not yours to set")
    assert not (tmp_path / "out").exists()
