"""Two processes on one machine: same model as one process, and one rank does the hashing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import cli_fixtures as cli
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


FEW = "--max_steps 4 --per_device_train_batch_size 4"
ONE_EACH = "--max_steps 12 --per_device_train_batch_size 1 --lr_scheduler_type linear"


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("--method prift-mass", FEW),
        ("--method dft --lora-r 4", f"{FEW} --gradient_checkpointing"),
        ("--method prift-mass --rule-arg threshold=0.8", ONE_EACH),
    ],
    ids=["full", "lora-checkpointing", "unequal-work"],
)
def test_two_ranks_equal_one_process(tmp_path, options, flags):
    """Unequal micro-batches on two gloo ranks give the parameters of accumulating over two; also
    where one rank, or both, have no token with a weight."""
    lab = Lab(tmp_path)
    lab.precompute()
    command = ["train", "--model", lab.model, "--data", lab.data, "--cache", lab.cache]
    command += ["--max-length", "60", "--json", *options.split()]
    fixed = "--learning_rate 1e-3 --weight_decay 0.1 --train_sampling_strategy sequential"
    flags = ["--", "--logging_steps", "1", *flags.split(), *fixed.split()]
    two, one = tmp_path / "two", tmp_path / "one"
    result = run([*TORCHRUN, "-m", "prift", *command, "--output", str(two), *flags])
    assert result.returncode == 0, result.stderr
    accumulate = ["--gradient_accumulation_steps", "2"]
    alone = cli.prift(*command, "--output", str(one), *flags, *accumulate)
    cli.succeeded(alone)
    skipped = [json.loads(o.splitlines()[-1])["skipped"] for o in (result.stdout, alone.stdout)]
    assert skipped[0] == skipped[1] and (skipped[0] > 0) == ("threshold" in options)
    [name] = (p.name for p in one.glob("*.safetensors"))
    ours, expected = (load_file(p / name) for p in (two, one))
    before = load_file(f"{lab.model}/model.safetensors")
    moved = (not torch.equal(ours[n], before.get(n, torch.zeros_like(ours[n]))) for n in ours)
    assert all(moved) and ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)
    for a, b in zip(logged(two), logged(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-9)
        assert a["mean_weight"] == pytest.approx(b["mean_weight"], rel=1e-6)


def logged(output: Path) -> list[dict]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]
