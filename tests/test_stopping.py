"""SIGTERM and Ctrl-C while `prift precompute` runs: what was scored is kept, the exit code says why
it ended. The process signals itself at the moment meant, so nothing depends on how fast it is."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prift.errors import CacheError
from prift.signals import Stopped, Stopping
from prift.store.parts import check_hash
from tests.lab import Lab

ITSELF = """
import os, sys, threading, time
import prift_cli
from prift.scoring import Storing
from prift.store.writer import PartWriter
from prift.backends import hf
number, moment, at = int(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
calls = []
def signalled(function, after):
    def wrapper(*given, **named):
        calls.append(1)
        if not after and len(calls) == at:
            os.kill(os.getpid(), number)
        result = function(*given, **named)
        if after and len(calls) == at:
            os.kill(os.getpid(), number)
        return result
    return wrapper
if moment == "row":
    Storing.handle = signalled(Storing.handle, after=True)
elif moment == "loading":
    hf.load_model = signalled(hf.load_model, after=False)
elif moment == "lock":  # as in Condition.wait, between a lock's release and its acquisition
    def load_model(*given, **named):
        lock = threading.Lock()
        with lock:
            lock.release()
            os.kill(os.getpid(), number)
            time.sleep(60)
    hf.load_model = load_model
else:  # once with the row, and again as its part is being finished
    Storing.handle = signalled(Storing.handle, after=True)
    finish = PartWriter.finish
    def again(*given):
        os.kill(os.getpid(), number)
        time.sleep(60)  # were the process to go on, this would be seen
        return finish(*given)
    PartWriter.finish = again
prift_cli.main()
"""


def ended(lab: Lab, number: int, moment: str, at: int = 1) -> subprocess.CompletedProcess:
    """`prift precompute` that signals itself: as the `at`-th row was handed to the writer, as the
    model is being loaded, or at a row and `again` while the last part is being finished."""
    words = ["precompute", "--model", lab.model, "--data", lab.data, "--cache", lab.cache]
    words += ["--max-length", "60", "--batch-tokens", "60"]
    return subprocess.run(
        [sys.executable, "-c", ITSELF, str(int(number)), moment, str(at), *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )


def rows_of(lab: Lab) -> int:
    """In all visible parts, each of which is whole."""
    parts = list(Path(lab.cache).glob("*/parts/[!.]*.parquet"))
    for part in parts:
        check_hash(part)
    return sum(pq.ParquetFile(part).metadata.num_rows for part in parts)


def left(lab: Lab) -> list[str]:
    """What lies in the cache beside parts and identities."""
    files = (path for path in Path(lab.cache).rglob("*") if path.is_file())
    return [path.name for path in files if path.suffix != ".parquet" and path.name != "prior.json"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_keeps_the_rows(tmp_path, number, code):
    """No part was due yet: the signal finished it."""
    lab = Lab(tmp_path, rows=400)
    done = ended(lab, number, "row", 30)
    assert done.returncode == code, done.stderr
    said = f"{number.name}: the part in work is finished; a second signal ends at once"
    assert said in done.stderr and "Traceback" not in done.stderr
    kept = int(re.search(r"stopped: (\d+) sequences scored by this run are kept", done.stderr)[1])
    assert 30 <= kept == rows_of(lab) < 380
    assert left(lab) == []
    result = lab.precompute()
    assert result.scored == result.sequences - kept
    assert lab.precompute().scored == 0


@pytest.mark.parametrize("moment", ["loading", "lock"])
def test_a_signal_while_the_model_is_loaded_leaves_nothing(tmp_path, moment):
    """Where it strikes inside a lock of Python's own too, which makes a RuntimeError of it."""
    lab = Lab(tmp_path)
    done = ended(lab, signal.SIGTERM, moment)
    assert done.returncode == 143, done.stderr
    assert "stopped: 0 sequences scored by this run are kept" in done.stderr
    assert not list(Path(lab.cache).rglob("*"))


def test_a_second_signal_ends_at_once_and_the_next_run_cleans_up(tmp_path):
    lab = Lab(tmp_path, rows=100)
    done = ended(lab, signal.SIGINT, "again", 10)
    assert done.returncode == 130, done.stderr
    assert rows_of(lab) == 0
    assert sorted(Path(name).suffix for name in left(lab))[-1] == ".tmp"
    result = lab.precompute()
    assert result.scored == result.sequences
    assert left(lab) == []


def test_a_cache_that_takes_no_claim_is_named_and_a_complete_one_needs_none(tmp_path):
    lab = Lab(tmp_path)
    result = lab.precompute(text={"limit": 20})
    Path(result.folder, "claims").write_text("in the way of a folder")
    assert lab.precompute(text={"limit": 20}).scored == 0
    with pytest.raises(CacheError, match="cannot write to the cache .*: File exists. Finished"):
        lab.precompute()
    assert rows_of(lab) == 20


def test_what_leaves_is_the_signal_and_other_errors_stay():
    lock = threading.Lock()
    with pytest.raises(Stopped) as found, Stopping():
        with lock:
            lock.release()
            signal.raise_signal(signal.SIGTERM)
    assert found.value.signal == signal.SIGTERM
    with pytest.raises(RuntimeError, match="its own"), Stopping():
        raise RuntimeError("its own")
    with pytest.raises(CacheError), Stopping():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped:
            raise CacheError("no room") from None
