"""What ends a run of `prift precompute` in a later window: the rows of the earlier ones are kept,
the error says what it would have said in one window, and no thread is left behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from prift.cache import PriorCache, list_priors
from prift.errors import CacheError, DataError, ModelError
from prift.precompute import PrecomputeOptions, precompute
from prift.store.writer import PartWriter
from tests.families import tiny
from tests.lab import Lab


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = {t for t in threading.enumerate() if t.name.startswith("prift")}
    assert left <= before


def add_rows(lab: Lab, *rows: dict, at: int) -> None:
    lines = Path(lab.data).read_text().splitlines()
    lines[at:at] = [json.dumps(row) for row in rows]
    Path(lab.data).write_text("\n".join(lines))


def rows_of(lab: Lab, cache: str | None = None) -> int:
    (identity,) = list_priors(cache or lab.cache).values()
    return len(PriorCache(cache or lab.cache, identity))


def test_a_bad_row_late_keeps_the_windows_before_it(tmp_path):
    lab = Lab(tmp_path)
    add_rows(lab, {"prompt": "a"}, at=25)
    with pytest.raises(DataError, match=r"data.jsonl:26: .*no 'response' here"):
        lab.precompute(window_rows=10)
    assert rows_of(lab) == 20


def test_unfit_rows_late_are_all_counted_and_keep_the_windows_before(tmp_path):
    lab = Lab(tmp_path)
    add_rows(lab, {"prompt": "a", "response": ""}, at=38)
    add_rows(lab, {"prompt": "b", "response": ""}, at=25)
    with pytest.raises(DataError, match="^2 of 42 rows have no token .*data.jsonl:26, data.jsonl"):
        lab.precompute(window_rows=10)
    assert rows_of(lab) == 20


def test_an_id_outside_the_vocabulary_late_keeps_the_windows_before(tmp_path):
    lab = Lab(tmp_path)
    ids = [[n, n + 1, n + 2] for n in range(1, 31)]
    ids[24] = [1, 600, 2]
    rows = [{"input_ids": one, "labels": [-100, *one[1:]]} for one in ids]
    Path(lab.data).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"data.jsonl:25: token id 600 .* vocabulary of 512"):
        lab.precompute(window_rows=10)
    assert rows_of(lab) == 20


def test_nan_late_keeps_what_was_scored(tmp_path):
    lab = Lab(tmp_path)
    model = tiny("llama", vocabulary=512)
    with torch.no_grad():
        model.get_input_embeddings().weight[500] = torch.nan
    model.save_pretrained(lab.model)
    add_rows(lab, {"prompt": " ".join(["go"] * 30), "response": " 1"}, at=15)
    rows = [{"input_ids": [1] * n, "labels": [-100] + [1] * (n - 1)} for n in range(2, 30)]
    rows[20] = {"input_ids": [1, 500, 2], "labels": [-100, 500, 2]}
    Path(lab.data).write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ModelError, match=r"data.jsonl:21: .* NaN"):
        lab.precompute(window_rows=10, batch_tokens=30)
    assert 20 <= rows_of(lab) < 28


def test_a_writer_that_fails_ends_the_run(tmp_path, monkeypatch):
    """The cache's folder of parts is taken away after the first part was written."""
    lab = Lab(tmp_path, rows=200)
    finish = PartWriter.finish

    def spoil(part):
        path = finish(part)
        path.parent.rename(tmp_path / "away")
        return path

    monkeypatch.setattr(PartWriter, "finish", spoil)
    options = PrecomputeOptions(window_rows=20, batch_tokens=30, part_seconds=0.0)
    with pytest.raises(CacheError, match="cannot write to the cache .* No such file"):
        precompute(lab.model, lab.spec(), lab.cache, options)
    assert len(list((tmp_path / "away").glob("*.parquet"))) == 1


RUN = """
import json, sys, threading
from prift.text.dataspec import DataSpec
from prift.errors import CacheError
from prift.precompute import PrecomputeOptions, precompute
model, data, cache, part_seconds = sys.argv[1:]
options = PrecomputeOptions(window_rows=64, batch_tokens=40, part_seconds=float(part_seconds))
def say(line):
    print(line, flush=True)
try:
    precompute(model, DataSpec((data,)), cache, options, say)
except (KeyboardInterrupt, CacheError) as error:
    say(f"{type(error).__name__} {error}")
    threads = [t.name for t in threading.enumerate() if t.name.startswith("prift")]
    say(f"threads {threads}")
"""


def run(lab: Lab, part_seconds: float, room: int | None = None) -> subprocess.Popen:
    root = str(Path(__file__).parent.parent)

    def bounded():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return subprocess.Popen(
        [sys.executable, "-c", RUN, lab.model, lab.data, lab.cache, str(part_seconds)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=None if room is None else bounded,
    )


def parts_rows(lab: Lab) -> int:
    parts = Path(lab.cache).glob("*/parts/[!.]*.parquet")
    return sum(pq.ParquetFile(part).metadata.num_rows for part in parts)


@pytest.mark.parametrize("begun", ["prior.json", "parts/.*"])
def test_an_interrupt_keeps_the_rows_and_ends_the_threads(tmp_path, begun):
    """No part is due for long: what is kept, the interrupt wrote. A part has a hidden file from
    its first row on."""
    lab = Lab(tmp_path, rows=8000)
    process = run(lab, part_seconds=600)
    try:
        while "scored while" not in (line := process.stdout.readline()):
            assert line
        while not list(Path(lab.cache).glob(f"*/{begun}")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert said.endswith("KeyboardInterrupt \nthreads []\n")
    assert process.returncode == 0
    assert not [p for p in Path(lab.cache).rglob("*") if p.suffix == ".tmp"]
    assert (begun != "prior.json") <= parts_rows(lab) < 8000


def test_a_full_disk_ends_the_run_and_the_threads(tmp_path):
    """No file may grow to what all the rows take."""
    lab = Lab(tmp_path, rows=1500)
    process = run(lab, part_seconds=600, room=12_000)
    said, _ = process.communicate(timeout=120)
    lines = said.splitlines()
    assert lines[-1] == "threads []"
    assert any(line.startswith("CacheError cannot write to the cache") for line in lines)
    assert process.returncode == 0
    assert not [p for p in Path(lab.cache).rglob("*") if p.suffix in (".tmp", ".parquet")]
    result = lab.precompute(window_rows=64)
    assert result.scored == result.sequences > 1400
