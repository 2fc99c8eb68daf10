"""Help, version, start-up time, `--json`, and what goes to which stream."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import click
import pyarrow.parquet as pq
import pytest

import prift as library
from prift_cli.docs import commands
from tests import cli_fixtures as cli

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "yaml", "rich")
COMMANDS = {c.command_path: one for one, c in commands() if not isinstance(one, click.Group)}


def python(code: str) -> str:
    """What this Python prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    "args", [["--help"], ["precompute", "--help"], ["train", "--help"], ["cache", "-h"]]
)
def test_help_imports_nothing_heavy(args):
    code = f"""
import sys
from prift_cli import main
try:
    main({args!r})
except SystemExit as end:
    assert end.code == 0, end.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    assert python(code).splitlines()[-1] == "loaded: []"


def test_help_is_quick():
    """In time of the processor, of which a busy machine takes no more."""

    def seconds() -> float:
        begin = os.times()
        assert cli.shell("prift --help", timeout=30).returncode == 0
        end = os.times()
        return sum(end[2:4]) - sum(begin[2:4])  # of child processes, user and system

    assert min(seconds() for _ in range(5)) < 0.3


def test_version():
    assert cli.succeeded(cli.prift("--version")) == f"prift, version {library.__version__}\n"


def test_python_m_prift_is_prift():
    done = subprocess.run(
        [sys.executable, "-m", "prift", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith(f"version {library.__version__}\n")


def test_dash_h_is_help():
    for path in ("prift", *COMMANDS):
        words = path.split()[1:]
        assert cli.prift(*words, "-h").output == cli.prift(*words, "--help").output


def test_no_command_prints_the_help():
    assert "precompute" in cli.prift().output


def test_every_command_and_option_has_help():
    assert {"prift precompute", "prift train"} <= set(COMMANDS)
    for path, command in COMMANDS.items():
        assert command.help, path
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help and option.help.endswith((".", "]")), f"{path} {option.name}"


def test_every_option_is_a_word_with_dashes():
    for path, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, click.Option):
                longest = max(option.opts, key=len)
                assert longest == f"--{option.name.replace('_', '-')}" or longest == "--json", path


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_shows_an_example_that_parses(path):
    example = re.search(r"Example:\n((?: +.*\n?)+)", COMMANDS[path].help.replace("\b", ""))
    assert example, path
    words, own = shlex.split(example[1].replace("\\\n", " ")), path.split()
    assert words[: len(own)] == own
    COMMANDS[path].make_context(path, words[len(own) :])  # required options are demanded here


def test_both_commands_have_the_same_data_options():
    shared = {"data", "data_weight", "split", "format", "template", "chat_template", "tokenizer"}
    shared |= {"labels", "system", "max_length", "on_empty", "limit", "trust_remote_code"}
    for path in ("prift precompute", "prift train"):
        assert shared <= {option.name for option in COMMANDS[path].params}


def test_unknown_option_and_command():
    cli.refused(cli.prift("precompute", "--nope"), "No such option", "--nope", code=2)
    cli.refused(cli.prift("fly"), "No such command 'fly'", code=2)


def test_trainer_flag_without_dashes_says_where_it_belongs():
    message = cli.refused(cli.prift("train", "--learning_rate", "1"), "--learning_rate", code=2)
    assert "behind a lone --" in message


def test_missing_required_options():
    cli.refused(cli.prift("precompute", "--data", "x"), "Missing option '--model'", code=2)
    cli.refused(cli.prift("train", "--model", "x", "--data", "y"), "'--output'", code=2)


def test_precompute_json(model, data, tmp_path):
    done = cli.precompute(model, data, tmp_path / "cache", "--json")
    cli.succeeded(done)
    found = json.loads(done.stdout)
    assert found["sequences"] == found["scored"] == found["examples"] == len(cli.ROWS)
    assert (tmp_path / "cache" / found["prior"] / "prior.json").is_file()
    again = json.loads(cli.precompute(model, data, tmp_path / "cache", "--json").stdout)
    assert again["scored"] == again["scored_tokens"] == 0


def test_train_json_is_all_there_is_on_stdout(model, data, tmp_path):
    done = cli.train(model, data, tmp_path / "out", "--json", "--", "--logging_steps", "1")
    cli.succeeded(done)
    found = json.loads(done.stdout)
    assert found["steps"] == 2 and found["output"] == str(tmp_path / "out")
    assert {"loss", "nll", "mean_weight", "zero_share"} <= set(found["metrics"])
    assert "loss" in done.stderr  # the logs are for people


def test_a_short_run_still_says_its_metrics(model, data, tmp_path):
    said = cli.succeeded(cli.train(model, data, tmp_path / "out"))  # 2 steps, logging_steps is 10
    assert re.search(r"2 steps in .* nll \d+\.\d{4}", said), said


def test_as_a_script_sees_it(model, data, tmp_path):
    """No bar where stderr is no terminal, no warning of other packages; the cache below home."""
    where = ["--model", model, "--data", data]
    done = cli.shell(["prift", "precompute", *where], HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    cache = tmp_path / ".cache" / "prift"
    assert list(cache.glob("*/parts/*.parquet"))
    more = ["--cache", cache, "--method", "prift-mass", "--output", tmp_path / "out"]
    trained = cli.shell(["prift", "train", *where, *more, "--", "--max_steps", "1"])
    assert trained.returncode == 0, trained.stderr
    for said in (done.stderr, trained.stderr):
        assert "\r" not in said and "%|" not in said and "Warning" not in said, said


def test_said_once_in_a_distributed_run(monkeypatch, capsys):
    from prift_cli.command import say

    for rank, expected in (("0", "hello\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        say("hello")
        assert capsys.readouterr().err == expected


def test_interrupt_keeps_what_was_scored(model, tmp_path):
    rows = [{"prompt": f"{n} clips", "completion": " sold"} for n in range(20_000)]
    data = cli.write_rows(tmp_path / "many.jsonl", rows)
    command = ["precompute", "--model", model, "--data", data, "--cache", tmp_path / "cache"]
    command += ["--batch-tokens", "16", "--part-seconds", "0.2"]
    running = subprocess.Popen(
        [cli.PRIFT, *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("cache/*/parts/*.parquet")):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=30)
    finally:
        running.kill()
    assert running.returncode == 130
    assert "sequences scored by this run are kept in" in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.tmp"))
    parts = tmp_path.glob("cache/*/parts/*.parquet")
    assert 0 < sum(pq.ParquetFile(part).metadata.num_rows for part in parts) < 20_000
