"""Two processes on one machine: same model as one process, and one rank does the hashing."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.lab import Lab

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

ONE_HASHES = """
import sys
from pathlib import Path
import torch.distributed as dist
from prift.errors import DataError
from prift.ranks import from_rank_zero, is_rank_zero
dist.init_process_group("gloo")
calls = []
assert from_rank_zero(lambda: calls.append(1) or "value") == "value"
assert len(calls) == (1 if is_rank_zero() else 0)
try:
    from_rank_zero(lambda: (_ for _ in ()).throw(DataError("seen by all")))
except DataError as error:
    Path(sys.argv[1], f"rank{dist.get_rank()}").write_text(str(error))
dist.destroy_process_group()
"""


def run(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip


def test_rank_zero_computes_for_all_and_errors_reach_all(tmp_path):
    script = tmp_path / "one.py"
    script.write_text(ONE_HASHES)
    result = run([*TORCHRUN, str(script), str(tmp_path)])
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["seen by all"] * 2


@pytest.mark.parametrize("method", ["prift-mass"])
def test_two_ranks_equal_one_process(tmp_path, method):
    """Unequal micro-batches on two gloo ranks give the parameters of accumulating over two."""
    lab = Lab(tmp_path)
    lab.precompute()
    # fmt: off
    command = [
        "-m", "prift", "train", "--model", lab.model, "--data", lab.data, "--cache", lab.cache,
        "--max-length", "60", "--method", method,
    ]
    flags = [
        "--", "--max_steps", "4", "--per_device_train_batch_size", "4",
        "--learning_rate", "1e-3", "--logging_steps", "1",
        "--train_sampling_strategy", "sequential",
    ]
    # fmt: on
    two, one = tmp_path / "two", tmp_path / "one"
    result = run([*TORCHRUN, *command, "--output", str(two), *flags])
    assert result.returncode == 0, result.stderr
    accumulate = ["--gradient_accumulation_steps", "2"]
    result = run([sys.executable, *command, "--output", str(one), *flags, *accumulate])
    assert result.returncode == 0, result.stderr
    ours, expected = (load_file(p / "model.safetensors") for p in (two, one))
    before = load_file(f"{lab.model}/model.safetensors")
    assert any(not torch.equal(ours[n], before[n]) for n in ours)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)
