"""Bad input to `prift train`: a message that says what, what was found and what mends it; the exit
code; no traceback; and an output folder that was not there is not begun."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from prift.errors import PriftError
from prift.output import writing
from tests import cli_fixtures as cli

MASS = ("--method", "prift-mass")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return cli.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    return cli.make_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return cli.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, model, data) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    cli.succeeded(cli.precompute(model, data, folder))
    return folder


def refused(model, data, output: Path, *more, words=()) -> str:
    """The message of the refusal; the output folder is not begun."""
    message = cli.refused(cli.train(model, data, output, *more), *words)
    assert not output.exists()
    return message


def prior_ids(cache: Path) -> list[str]:
    return [p.parent.name for p in cache.glob("*/prior.json")]


def suggestion(message: str) -> str:
    """The one command that the message tells to run."""
    found = re.findall(r"^  (prift precompute .*)$", message, re.MULTILINE)
    assert len(found) == 1, message
    return found[0]


def test_cache_of_another_model(model, other, data, cache, tmp_path):
    [held] = prior_ids(cache)
    message = refused(
        other, data, tmp_path / "out", *MASS, "--cache", cache,
        words=[f"holds no prior of {other}", f"--prior {held}", "; weights "],
    )  # fmt: skip
    assert "config " not in message.split("It holds:")[1]  # only what differs
    own = json.loads((cache / held / "prior.json").read_text())
    assert f"weights {own['weights'][:12]}, asked for " in message
    chosen = cli.train(other, data, tmp_path / "out", *MASS, "--cache", cache, "--prior", held)
    assert f"prior {held}" in cli.succeeded(chosen)


def test_cache_of_another_model_suggests_a_command_that_mends_it(other, data, cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "cache")
    message = refused(other, data, tmp_path / "out", *MASS, "--cache", own)
    cli.succeeded(cli.prift(*shlex.split(suggestion(message))[1:]))
    assert len(prior_ids(own)) == 2
    cli.succeeded(cli.train(other, data, tmp_path / "out", *MASS, "--cache", own))


def test_several_priors_of_this_model(model, data, cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "cache")
    cli.succeeded(cli.precompute(model, data, own, "--dtype", "bfloat16"))
    message = refused(model, data, tmp_path / "out", *MASS, "--cache", own)
    assert f"2 priors of {model}" in message
    for prior in prior_ids(own):
        assert f"--prior {prior}" in message
    assert "dtype float32" in message and "dtype bfloat16" in message


def test_cache_that_misses_examples(model, cache, tmp_path):
    """With options, and names that a shell would split: the suggestion holds all that matters."""
    own = shutil.copytree(cache, tmp_path / "cache")
    new = [{"prompt": "Once upon a time", "completion": " Beep loved to go fast."}] * 2
    rows = cli.write_rows(tmp_path / "two words" / "rows.jsonl", [*cli.ROWS, *new])
    more = cli.write_rows(tmp_path / "more.jsonl", [{"prompt": "Once", "completion": " upon"}])
    options = ["--data", more, "--data-weight", "1", "--data-weight", "2", "--max-length", "20"]
    options += ["--tokenizer", model, "--limit", "8", "--template", "plain"]
    wanted = ["--cache", own, *MASS, *options]
    message = refused(model, rows, tmp_path / "out", *wanted)
    assert re.search(r"\d+ of 10 sequences have no prior", message), message
    assert "(first: rows.jsonl:7)" in message
    command = suggestion(message)
    said = cli.succeeded(cli.prift(*shlex.split(command)[1:]))
    assert "6 in the cache" in said
    cli.succeeded(cli.train(model, rows, tmp_path / "out", *wanted))


def test_cache_that_misses_evaluation_data(model, data, cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "cache")
    held_out = cli.write_rows(tmp_path / "eval.jsonl", [{"prompt": "a", "completion": " b"}])
    wanted = ["--cache", own, *MASS, "--eval-data", held_out]
    message = refused(model, data, tmp_path / "out", *wanted)
    assert "1 of 1 sequences" in message and "eval.jsonl:1" in message
    cli.succeeded(cli.prift(*shlex.split(suggestion(message))[1:]))
    cli.succeeded(cli.train(model, data, tmp_path / "out", *wanted))


def test_no_cache(model, data, tmp_path):
    words = ["--cache", "prift precompute --model"]
    refused(model, data, tmp_path / "out", *MASS, words=words)
    absent = tmp_path / "absent"
    message = refused(model, data, tmp_path / "out", *MASS, "--cache", absent)
    assert f"{absent} holds no prior" in message
    cli.succeeded(cli.prift(*shlex.split(suggestion(message))[1:]))
    cli.succeeded(cli.train(model, data, tmp_path / "out", *MASS, "--cache", absent))


def test_prior_that_is_not_there(model, data, cache, tmp_path):
    for name, words in [
        ("0123456789abcdef", ["holds no prior 0123456789abcdef", *prior_ids(cache)]),
        ("./absent", ["--prior ./absent: no such folder"]),
        ("nobody/absent", ["--prior nobody/absent: no such folder", "the hub"]),
    ]:
        refused(model, data, tmp_path / "o", *MASS, "--cache", cache, "--prior", name, words=words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([*MASS, "--rule-arg", "tau=0.5"], ["no argument 'tau'", "threshold=0.5, ties=paper"]),
        ([*MASS, "--rule-arg", "threshold=half"], ["threshold=half is not a float"]),
        ([*MASS, "--rule-arg", "threshold=2"], ["threshold=2", "in [0, 1]"]),
        ([*MASS, "--rule-arg", "threshold"], ["--rule-arg threshold", "name=value"]),
        ([*MASS, "--rule-arg", "ties=mine"], ["ties=mine is not paper or official-code"]),
        (["--method", "prift-prob", "--ties", "paper"], ["rule prob", "'ties'", "power=1.0"]),
        (["--rule", "soft", "--source", "prior"], ["unknown rule 'soft'", "uniform, prob, mass"]),
        (["--rule", "mass"], ["rule mass needs --source prior or --source online"]),
        (["--method", "dft", "--source", "prior"], ["choose one of --method", "--rule"]),
        (["--method", "dft", "--rule", "prob"], ["choose one of --method", "--rule"]),
        (["--method", "sft", "--merge"], ["--merge", "needs --lora-r"]),
        (["--method", "sft", "--lora-r", "2", "--lora-target", "no_such"], ["--lora-target"]),
        (["--method", "sft", "--attention", "no_such"], ["no_such"]),
    ],
)
def test_options_that_cannot_be(model, data, tmp_path, more, words):
    refused(model, data, tmp_path / "out", *more, words=words)


def test_no_method(model, data, tmp_path):
    where = ["--model", model, "--data", data, "--output", tmp_path / "out"]
    cli.refused(cli.prift("train", *where), "choose one of --method NAME, or --rule NAME")


def test_bad_data_and_models_as_in_precompute(model, data, tmp_path):
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    bad = str(tmp_path / "bad.jsonl")
    refused(model, bad, tmp_path / "out", words=["bad.jsonl:1", "an object"])
    small = cli.make_model(tmp_path / "small", vocab_size=100)
    refused(small, data, tmp_path / "out", words=["rows.jsonl:1", "vocabulary of 100"])
    (tmp_path / "small" / "model.safetensors").unlink()
    refused(small, data, tmp_path / "out", words=["no model.safetensors", "no weights"])


def test_output_that_is_not_empty(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    cli.refused(cli.train(model, data, tmp_path / "out"), "not empty", "--resume")
    assert os.listdir(tmp_path / "out") == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    cli.refused(cli.train(model, data, tmp_path / "file"), str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    cli.succeeded(cli.train(model, data, tmp_path / "empty"))


def test_resume(model, data, tmp_path):
    out = tmp_path / "out"
    refused(model, data, out, "--resume", words=["--resume", "no whole checkpoint"])
    more = ["--save_steps", "1", "--learning_rate", "1e-3"]
    cli.succeeded(cli.train(model, data, out, "--", "--max_steps", "3", *more))
    through = safetensors.torch.load_file(out / "model.safetensors")
    shutil.rmtree(out / "checkpoint-3")
    (out / "checkpoint-2" / "trainer_state.json").write_text("")  # cut short by a kill
    cli.succeeded(cli.train(model, data, out, "--resume", "--", "--max_steps", "3", *more))
    resumed = safetensors.torch.load_file(out / "model.safetensors")
    for name, tensor in through.items():
        torch.testing.assert_close(resumed[name], tensor)


def test_a_model_that_answers_nan(model, data, tmp_path):
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    stopped = cli.train(str(broken), data, tmp_path / "out", "--", "--logging_steps", "1")
    cli.refused(stopped, "loss is NaN at step 1", "--learning_rate", "prift precompute")


def test_full_disk(model, data, tmp_path):
    out = tmp_path / "out"
    command = ["prift", "train", "--model", model, "--data", data, "--method", "sft"]
    command += ["--output", out, "--", "--max_steps", "2", "--save_steps", "1"]
    stopped = cli.shell(command, room=20_000)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert f"Error: cannot write to --output {out}: " in stopped.stderr
    assert "File too large" in stopped.stderr and "--resume" in stopped.stderr
    cli.refused(cli.train(model, data, out, "--resume"), "no whole checkpoint")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: Path(path).write_text("x" * 100_000),
        lambda path: torch.save({"x": torch.zeros(100_000)}, path),
        lambda path: torch.save({"x": torch.zeros(1)}, path),
    ],
)
def test_every_kind_of_write_that_a_full_disk_stops(write):
    with pytest.raises(PriftError, match="cannot write to --output OUT"), writing("OUT"):
        write("/dev/full")


def test_other_errors_are_no_full_disk():
    with pytest.raises(RuntimeError, match="shapes|size"), writing("OUT"):
        torch.zeros(2) @ torch.zeros(3)


def test_output_that_cannot_be_made(model, data):
    done = cli.train(model, data, "/dev/null/out")
    cli.refused(done, "cannot write to --output /dev/null/out", "Not a directory")


def test_debug_shows_the_traceback():
    command = ["prift", "train", "--model", "m", "--data", "d", "--output", "o"]
    plain, shown = cli.shell(command), cli.shell([*command, "--debug"])
    assert plain.returncode == shown.returncode == 1
    assert plain.stderr.startswith("Error: choose one of --method") and plain.stdout == ""
    assert "Traceback" in shown.stderr and "OptionError: choose one of --method" in shown.stderr
