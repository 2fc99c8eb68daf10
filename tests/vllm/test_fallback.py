"""`--vllm-mode auto` with a vLLM whose insides have moved, from end to end: bounds must do, and the
next run finds what they gave."""

import json

import pytest

from tests.vllm.lab import VLLMLab
from tests.vllm.moved import MOVED

PROGRAM = """
from prift.backends import vllm_options
vllm_options.EXTENSION = "tests.vllm.moved.Moved"
import prift_cli
prift_cli.main()
"""
EVERY = ("--engine-arg", "max_logprobs=-1")  # lists every token, so that each is known


@pytest.fixture(autouse=True)
def moved(monkeypatch):
    monkeypatch.setenv(MOVED, "logits are halved")


def test_a_run_after_bounds_had_to_do_scores_nothing_again(tmp_path):
    lab = VLLMLab(tmp_path, rows=30)
    first = lab.run(*EVERY, "--json", program=PROGRAM)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("no statistics from its workers: in the self-test") == 1
    assert first.stderr.count("distinct sequences") == 1
    result = json.loads(first.stdout)
    assert result["scored"] == result["sequences"] == lab.rows() > 10
    assert result["left_out"] == 0
    again = lab.run(*EVERY, "--json", program=PROGRAM)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert (result["scored"], result["left_out"]) == (0, 0)
    assert lab.rows() == result["sequences"]


def test_what_bounds_do_not_give_is_refused(tmp_path):
    lab = VLLMLab(tmp_path, rows=5)
    done = lab.run(*EVERY, "--statistics", "extended", program=PROGRAM)
    assert done.returncode == 1 and lab.rows() == 0
    assert "Error: --statistics extended needs statistics from vLLM's workers" in done.stderr
