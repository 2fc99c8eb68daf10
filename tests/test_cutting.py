"""Batches without waste: what no gradient comes from is not run, and nothing else changes."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from prift.dataset import PriorDataset, collate
from prift.methods import METHODS, weigher
from prift.roles import RESPONSE
from tests import cutting
from tests.cutting import BATCH, KEPT, NOTHING_TO_RUN, STEPS
from tests.test_request import examples

MASS = weigher("mass", "prior", {})


def by_mass(*rows) -> PriorDataset:
    """Examples of (ids, kept as in KEPT), cut by prift-mass."""
    plain = [(ids, kept.replace("0", "1").replace(".", "0")) for ids, kept in rows]
    kept = np.array([c == "1" for _, k in rows for c in k if c != "."])
    prior = {
        "logprob": -np.arange(1.0, len(kept) + 1, dtype=np.float32),
        "log_mass_rank": np.where(kept, 0, -9).astype(np.float32),
        "n_tie": np.ones(len(kept), np.int32),
    }
    return cutting.weighed(examples(*plain), prior, MASS)


def test_a_sequence_ends_where_its_last_weight_is_predicted():
    data = by_mass(([5, 6, 7, 8, 9], ".1010"), ([1, 2, 3], ".00"), ([3, 4], ".1"))
    assert data.lengths.tolist() == [3, 0, 1]
    items = [data[i] for i in range(3)]
    assert [item["input_ids"].tolist() for item in items] == [[5, 6, 7], [], [3]]
    assert [item["places"].tolist() for item in items] == [[1, 2, 3], [], [1]]
    assert [item["targets"].tolist() for item in items] == [[6, 7, 8], [], [4]]
    assert [item["prior"]["logprob"].tolist() for item in items] == [[-1, -2, -3], [], [-7]]
    assert [item["num_labels"] for item in items] == [4, 2, 1]
    whole = data.whole(0)
    assert whole["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert whole["targets"].tolist() == [6, 7, 8, 9] and whole["num_labels"] == 4


def test_batches_leave_out_what_has_no_weight():
    data = by_mass(([5, 6, 7, 8, 9], ".1010"), ([1, 2, 3], ".00"), ([3, 4], ".1"))
    batch = collate([data[i] for i in (1, 0, 2)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {name: values.tolist() for name, values in batch["tokens"].items()} == {
        "place": [0, 1, 2, 3], "target": [6, 7, 8, 4], "sequence": [0, 0, 0, 1],
        "role": [RESPONSE] * 4,
    }  # fmt: skip
    assert batch["prior"]["logprob"].tolist() == [-1, -2, -3, -7]
    assert batch["num_labels"] == 7 and batch["index"] == [0, 2, 1]


def test_a_batch_with_nothing_to_run_runs_one_token():
    data = by_mass(([1, 2, 3], ".00"), ([4, 5, 6, 7], "..00"))
    batch = collate([data[0], data[1]])
    assert batch["input_ids"].shape == (1, 1) and not len(batch["tokens"]["place"])
    assert batch["num_labels"] == 4 and batch["index"] == [0, 1]
    assert batch["prior"]["log_mass_rank"].dtype == torch.float32


def test_a_weight_that_is_no_number_is_not_cut_off():
    rows = examples(([1, 2, 3], "011"))
    prior = {"logprob": np.array([-1, np.nan], np.float32)}
    data = cutting.weighed(rows, prior, weigher("prob", "prior", {}))
    assert data[0]["places"].tolist() == [1, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 8192])
def test_weights_are_the_same_in_chunks_of_any_size(size, monkeypatch):
    monkeypatch.setattr("prift.weighing._CHUNK", size)
    data = cutting.dataset(MASS)
    ends = [kept.rfind("1") for kept in KEPT]
    assert data.lengths.tolist() == [max(end, 0) for end in ends]
    for index, kept in enumerate(KEPT):
        begin = kept.rfind(".") + 1
        wanted = list(range(begin, kept.rfind("1") + 1))
        assert data[index]["places"].tolist() == wanted


@cache
def expected(
    method: str,
    batches_a_step: int,
    ranks: int,
    dtype: torch.dtype,
    normalize: str,
    anchored: bool,
) -> dict:
    return cutting.naive(method, batches_a_step, ranks, dtype, normalize, anchored)


def assert_equal(
    ours: dict,
    method: str,
    batches_a_step: int,
    ranks: int = 1,
    normalize: str = "tokens",
    anchored: bool = False,
) -> None:
    """Losses, metrics and parameters, to what the naive computation itself loses in float32."""
    exact = expected(method, batches_a_step, ranks, torch.float64, normalize, anchored)
    rounded = expected(method, batches_a_step, ranks, torch.float32, normalize, anchored)
    assert len(ours["logged"]) == len(exact["logged"]) == STEPS
    for found, wanted in zip(ours["logged"], exact["logged"], strict=True):
        assert set(wanted) <= set(found)
        assert all((name in found) == (name in wanted) for name in ("nll", "anchor"))
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name
    start = cutting.tiny("llama").double().state_dict()
    for name, wanted in exact["parameters"].items():
        moved = float((wanted - start[name]).norm())
        budget = 4 * float((rounded["parameters"][name] - wanted).norm()) + 1e-6 * moved
        assert float((ours["parameters"][name] - wanted).norm()) <= budget, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_on_cut_batches_is_the_naive_training(tmp_path, method, accumulation):
    """One batch, and with accumulation one micro-batch of a step, has nothing to run."""
    ours = cutting.run(tmp_path, method, accumulation)
    assert_equal(ours, method, accumulation)
    ran = [width for _, width in ours["shapes"]]
    lengths = [max(map(len, KEPT[i : i + BATCH])) for i in range(0, len(KEPT), BATCH)]
    ends = [max(k.rfind("1") for k in KEPT[i : i + BATCH]) for i in range(0, len(KEPT), BATCH)]
    batches = STEPS * accumulation
    if METHODS[method][1] == "prior":  # the first is run whole, for nll and drift
        assert ran == [lengths[0], *(max(end, 1) for end in ends[1:batches])]
        assert ours["shapes"][NOTHING_TO_RUN] == (1, 1)
    else:
        assert ran == lengths[:batches]


def two_ranks(folder: Path, method: str, accumulation: int, *more: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
        + ["tests.cutting", str(folder), method, str(accumulation), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return {
        "logged": json.loads((folder / "logged.json").read_text()),
        "shapes": [json.loads((folder / f"shapes{rank}.json").read_text()) for rank in (0, 1)],
        "parameters": torch.load(folder / "parameters.pt"),
    }


@pytest.mark.parametrize(
    "method", [pytest.param("prift-prob", marks=pytest.mark.slow), "prift-mass"]
)
def test_a_rank_with_nothing_to_run_holds_nobody_up(tmp_path, method):
    ours = two_ranks(tmp_path, method, 1)
    assert ours["shapes"][0][1] == [1, 1] and ours["shapes"][1][1][1] > 1
    assert_equal(ours, method, 2, ranks=2)
