"""Shares of the work: by option, torchrun and srun; together the whole, each sequence once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prift.errors import OptionError
from prift.placement import device_of
from prift.shards import Shard, choose_shard, local_rank, parse_shard, shard_from_environment
from tests import cli_fixtures as cli
from tests.lab import Lab
from tests.test_ranks import TORCHRUN, run


def words(lab: Lab, *more: str) -> list[str]:
    given = ["--model", lab.model, "--data", lab.data, "--cache", lab.cache, "--max-length", "60"]
    return ["precompute", *given, *more]


def keys_of(lab: Lab) -> list[bytes]:
    """Of every row that is stored."""
    parts = Path(lab.cache).glob("*/parts/[!.]*.parquet")
    return [key.as_py() for part in parts for key in pq.read_table(part)["key"]]


def test_every_sequence_is_in_one_share_and_shares_are_equal():
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 999, 20, np.int32) for _ in range(4000)]
    owners = np.array([[Shard(i, 5).owns(s) for i in range(5)] for s in sequences])
    assert (owners.sum(1) == 1).all()
    # Binomial: 800 expected, standard deviation 25.3; five of these stray no further than 6.
    assert np.abs(owners.sum(0) - 800).max() < 152


def test_shares_together_are_the_whole_and_disjoint(tmp_path):
    """Whatever the windows, and whatever the cache holds already."""
    lab, whole = Lab(tmp_path / "lab"), Lab(tmp_path / "whole")
    whole.precompute()
    lab.precompute(text={"limit": 9})
    results = [
        lab.precompute(shard=Shard(i, 3), window_rows=rows) for i, rows in enumerate((5, 100, 7))
    ]
    assert sorted(keys_of(lab)) == sorted(keys_of(whole))
    assert sum(result.sequences for result in results) == 40
    assert sum(result.scored for result in results) == 31
    assert [result.examples for result in results] == [40] * 3
    assert [result.shard for result in results] == ["0/3", "1/3", "2/3"]
    assert lab.precompute().scored == 0


def test_the_shares_of_one_do_not_depend_on_windows_or_order(tmp_path):
    found = []
    for name, rows in (("a", 4), ("b", 100)):
        lab = Lab(tmp_path / name)
        if name == "b":
            lines = Path(lab.data).read_text().splitlines()
            Path(lab.data).write_text("\n".join(reversed(lines)))
        lab.precompute(shard=Shard(1, 4), window_rows=rows)
        found.append(sorted(keys_of(lab)))
    assert found[0] == found[1] and 0 < len(found[0]) < 40


def test_equal_sequences_are_one_share_s(tmp_path):
    lab = Lab(tmp_path, rows=6)
    Path(lab.data).write_text(Path(lab.data).read_text() * 3)
    scored = [lab.precompute(shard=Shard(i, 2), window_rows=4).scored for i in range(2)]
    assert sum(scored) == 6 == len(keys_of(lab))


def test_a_share_without_a_sequence(tmp_path):
    lab = Lab(tmp_path, rows=1)
    results = [lab.precompute(shard=Shard(i, 3)) for i in range(3)]
    assert sorted(result.scored for result in results) == [0, 0, 1]
    assert [result.examples for result in results] == [1] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4/4", "no share 4 of 4; shares are counted from 0: 0/4 to 3/4"),
        ("0/0", "0 shares; wanted 1 or more"),
        ("1", "--shard 1: wanted i/n"),
        ("-1/2", "wanted i/n"),
        ("1/2/3", "wanted i/n"),
    ],
)
def test_shares_that_are_none(text, message):
    with pytest.raises(OptionError, match=message):
        parse_shard(text)


TORCH = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "share", "local"),
    [
        ({}, None, None),
        (TORCH, Shard(1, 4, "RANK, WORLD_SIZE"), 1),
        (SRUN, Shard(2, 3, "SLURM_PROCID, SLURM_NTASKS"), 0),
        ({**SRUN, **TORCH}, Shard(1, 4, "RANK, WORLD_SIZE"), 1),
        ({**SRUN, **STEP}, Shard(2, 3, "SLURM_PROCID, SLURM_NTASKS"), 0),
        # a batch script: alone, whatever the job's tasks
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, None, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None, 0),
        ({"RANK": "0"}, None, None),
    ],
)
def test_shares_of_processes_that_were_started_together(environment, share, local):
    assert shard_from_environment(environment) == share
    assert local_rank(environment) == local


def test_variables_that_are_no_numbers_are_named():
    with pytest.raises(OptionError, match="RANK=x and WORLD_SIZE=4 should be whole numbers"):
        shard_from_environment({"RANK": "x", "WORLD_SIZE": "4"})
    with pytest.raises(OptionError, match="SLURM_PROCID, SLURM_NTASKS: there is no share 3 of 3"):
        shard_from_environment({**SRUN, "SLURM_PROCID": "3"})


def test_the_option_wins(monkeypatch):
    for name, value in TORCH.items():
        monkeypatch.setenv(name, value)
    assert choose_shard("0/2")[0] == Shard(0, 2, "--shard")
    assert choose_shard(None)[0] == Shard(1, 4, "RANK, WORLD_SIZE")


def test_without_cuda_no_device_is_chosen():
    import torch

    if not torch.cuda.is_available():
        assert device_of(1) is None
    assert device_of(None) is None


def test_the_option_and_slurm_s_variables(tmp_path):
    lab = Lab(tmp_path)
    one = cli.shell(["prift", *words(lab, "--shard", "0/2", "--json")])
    assert one.returncode == 0, one.stderr
    assert "share 0/2 of the sequences (--shard)" in one.stderr
    assert "distinct sequences of share 0/2, 0 in the cache" in one.stderr
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    other = cli.shell(["prift", *words(lab)], **slurm)
    assert other.returncode == 0, other.stderr
    assert "share 1/2 of the sequences (SLURM_PROCID, SLURM_NTASKS)" in other.stderr
    result = json.loads(one.stdout)
    assert result["shard"] == "0/2"
    assert f"share 1/2: {40 - result['scored']} sequences scored" in other.stdout
    assert len(keys_of(lab)) == len(set(keys_of(lab))) == 40


def test_torchrun_shares_the_work(tmp_path):
    lab = Lab(tmp_path)
    result = run([*TORCHRUN, "-m", "prift", *words(lab, "--json")])
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert sorted(one["shard"] for one in found) == ["0/2", "1/2"]
    assert sum(one["scored"] for one in found) == 40
    assert len(keys_of(lab)) == len(set(keys_of(lab))) == 40
    for share in ("0/2", "1/2"):
        assert result.stderr.count(f"share {share} of the sequences (RANK, WORLD_SIZE)") == 1
    assert result.stderr.count("40 rows -> 40 examples") == 1  # said once


def test_a_share_that_is_none_is_refused_before_anything_is_read(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "prift", "precompute", "--model", "none", "--data", "none"]
        + ["--shard", "2/2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Error: --shard: there is no share 2 of 2" in done.stderr
