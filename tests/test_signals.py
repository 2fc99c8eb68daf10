"""Real processes that are interrupted or killed, and go on to the model of an uninterrupted run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import cli_fixtures as cli
from tests.lab import Lab
from tests.test_ranks import TORCHRUN

# Several epochs of group_by_length, so that the order of a later one has to be found again.
FLAGS = "--max_steps 60 --learning_rate 1e-3 --per_device_train_batch_size 4 --logging_steps 1"
LORA = ["--lora-r", "4", "--lora-dropout", "0.3"]
WORKERS = "--dataloader_num_workers 2"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.precompute()
    return lab


def arguments(lab: Lab, output: Path, options: list[str], flags: str) -> list[str]:
    words = ["train", "--model", lab.model, "--data", lab.data, "--cache", lab.cache]
    words += ["--max-length", "60", "--method", "prift-mass", "--output", str(output), *options]
    return [*words, "--", *FLAGS.split(), *flags.split()]


def start(words: list[str]) -> subprocess.Popen:
    """A process whose stderr is read here; what it says goes on to the returned object's `said`."""
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    process.said = ""
    return process


def wait_for(process: subprocess.Popen, pattern: str, times: int = 1) -> None:
    """Reads until so many lines have the pattern."""
    for line in process.stderr:
        process.said += line
        times -= bool(re.search(pattern, line))
        if not times:
            return
    raise AssertionError(f"ended early, with {process.wait()}:\n{process.said}")


def ended(process: subprocess.Popen, timeout: float = 60) -> int:
    _, rest = process.communicate(timeout=timeout)
    process.said += rest
    return process.returncode


ITSELF = """
import os, sys
import prift_cli
from prift.trainer import PriftTrainer
number, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
log = PriftTrainer.log
def signalled(self, *given):
    log(self, *given)
    if self.state.global_step == step:
        os.kill(os.getpid(), number)
PriftTrainer.log = signalled
prift_cli.main()
"""


def start_with_signal(number: int, step: int, words: list[str]) -> subprocess.Popen:
    """`prift` with these words, which sends itself a signal once a step was logged."""
    return start([sys.executable, "-c", ITSELF, str(int(number)), str(step), *words])


def saved(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next(output.glob("*model.safetensors")))


def assert_goes_on(lab: Lab, output: Path, options: list[str], flags: str) -> None:
    """With --resume it ends, to the bit, in the model of a run that nothing interrupted."""
    assert not list(output.glob("*.safetensors"))
    cli.succeeded(cli.prift(*arguments(lab, output, [*options, "--resume"], flags)))
    straight = output.with_name(output.name + "-straight")
    cli.succeeded(cli.prift(*arguments(lab, straight, options, flags)))
    one, other = saved(output), saved(straight)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("number", "code", "options", "flags"),
    [
        (signal.SIGTERM, 143, [], "--save_strategy no"),
        (signal.SIGINT, 130, LORA, f"{WORKERS} --train_sampling_strategy random"),
    ],
    ids=["SIGTERM", "SIGINT-lora-workers"],
)
def test_a_signal_saves_a_checkpoint(lab, tmp_path, number, code, options, flags):
    output = tmp_path / "out"
    process = start_with_signal(number, 14, arguments(lab, output, options, flags))
    assert ended(process) == code, process.said
    [checkpoint] = output.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-15"  # in the second epoch
    assert f"{number.name}: a checkpoint is saved after this step" in process.said
    assert f"saved {checkpoint}. The same command with --resume" in process.said
    assert "Traceback" not in process.said
    assert_goes_on(lab, output, options, flags)


def test_a_second_ctrl_c_ends_at_once(lab, tmp_path):
    """An epoch of 20,000 micro-batches is one step, which takes minutes."""
    flags = "--gradient_accumulation_steps 20000 --per_device_train_batch_size 1"
    options = ["--data-weight", "500"]
    process = start([cli.PRIFT, *arguments(lab, tmp_path / "out", options, flags)])
    while not (tmp_path / "out" / "prift.yaml").exists():
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    wait_for(process, "a checkpoint is saved after this step; Ctrl-C ends at once")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert ended(process, timeout=20) == 130
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        pytest.param([], WORKERS, marks=pytest.mark.slow, id="full-workers"),
        pytest.param(LORA, "", id="lora"),
    ],
)
def test_a_run_that_is_killed_goes_on(lab, tmp_path, options, flags):
    output, flags = tmp_path / "out", f"{flags} --save_steps 7"
    process = start_with_signal(signal.SIGKILL, 23, arguments(lab, output, options, flags))
    assert ended(process) == -signal.SIGKILL
    assert len(list(output.glob("checkpoint-*"))) == 3
    assert_goes_on(lab, output, options, flags)


@pytest.mark.slow
def test_a_signal_to_two_processes(lab, tmp_path):
    """All ranks save one checkpoint together, whichever heard the signal; and go on together."""
    output, straight = tmp_path / "out", tmp_path / "straight"
    two = [*TORCHRUN, "-m", "prift"]
    process = start([*two, *arguments(lab, output, LORA, "")])
    wait_for(process, "'loss'", times=14)
    process.send_signal(signal.SIGTERM)
    assert ended(process) != 0
    [checkpoint] = output.glob("checkpoint-*")
    assert process.said.count(f"saved {checkpoint}. The same command with --resume") == 1
    assert {p.name for p in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    for words in (
        arguments(lab, output, [*LORA, "--resume"], ""),
        arguments(lab, straight, LORA, ""),
    ):
        process = start([*two, *words])
        assert ended(process, timeout=120) == 0, process.said
    one, other = saved(output), saved(straight)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_before_training_ends_the_process(lab, tmp_path):
    """Nothing is there to be saved."""
    process = start([cli.PRIFT, *arguments(lab, tmp_path / "out", [], "")])
    wait_for(process, "training: ")
    process.send_signal(signal.SIGTERM)
    assert ended(process) in (-signal.SIGTERM, 143)
    assert not list((tmp_path / "out").glob("*.safetensors"))
