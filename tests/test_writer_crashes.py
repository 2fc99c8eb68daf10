"""Writing when the disk is full, the user interrupts or the system kills: whole parts or none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prift.cache import PriorCache
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, files, runs

# Rows of 20,000 random tokens, so that ten of them fill a row group; told from a child process.
CHILD = """
import gc, itertools, resource, sys, time
import numpy as np
from prift.errors import CacheError
from prift.store.writer import CacheWriter
from tests.cache_fixtures import IDENTITY, runs

def row(number):
    rng = np.random.default_rng(number)
    n = 20_000
    return dict(
        logprob=-rng.random(n, np.float32), log_mass_rank=-rng.random(n, np.float32),
        rank=rng.integers(1, 99, n).astype(np.int32), n_tie=np.ones(n, np.int32),
        entropy=rng.random(n, np.float32),
    )

def add(writer, number):
    writer.add(b"%016d" % number, 20_001, runs(1, 20_001), row(number))
"""
FULL = """
try:
    with CacheWriter(sys.argv[1], IDENTITY, {}) as writer:
        add(writer, 0)
        writer.flush()
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for number in range(1, 25):
            add(writer, number)
except CacheError as error:
    print(error)
gc.collect()
"""


def child(code, *arguments, **options):
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


# 2 bytes: not even Parquet's first four; 1,000 and 300,000: within the first row group, of about
# two million; 4,700,000: as the part is finished.
@pytest.mark.parametrize("limit", [2, 1_000, 300_000, 4_700_000])
def test_a_full_disk_leaves_whole_parts_and_nothing_else(tmp_path, limit):
    process = child(FULL, tmp_path, limit)
    out, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 0
    assert "cannot write to the cache" in out and "File too large" in out
    assert "Finished parts are kept; once there is room" in out
    assert len(fx.parts(tmp_path)) == 1
    assert files(tmp_path) == [fx.parts(tmp_path)[0].name, "prior.json"]
    cache = PriorCache(tmp_path, IDENTITY)
    first = cache.read(np.array([b"%016d" % 0], "S16"), [runs(1, 20_001)], ("rank",))["rank"]
    rng = np.random.default_rng(0)
    rng.random(20_000, np.float32), rng.random(20_000, np.float32)
    assert np.array_equal(first, rng.integers(1, 99, 20_000))


def test_a_disk_too_full_for_prior_json(tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    CacheWriter(sys.argv[1], IDENTITY, {})
except CacheError as error:
    print(error)
"""
    out, err = child(code, tmp_path).communicate(timeout=60)
    assert (err, "File too large" in out) == ("", True)
    assert files(tmp_path) == []


def test_kill_leaves_only_whole_parts_visible(tmp_path):
    code = """
writer = CacheWriter(sys.argv[1], IDENTITY, {}, part_seconds=0.2)
number = 0
while True:
    add(writer, number)
    number += 1
"""
    process = child(code, tmp_path)
    try:
        deadline = time.monotonic() + 60
        while len(fx.parts(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    cache = PriorCache(tmp_path, IDENTITY)
    assert len(cache) >= 2
    every = np.array([b"%016d" % i for i in range(len(cache))], "S16")
    values = cache.read(every, [runs(1, 20_001)] * len(cache), CORE)
    assert len(values["rank"]) == 20_000 * len(cache)
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])  # what was left behind is in no one's way
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


def test_an_interrupt_at_any_time_leaves_only_whole_parts(tmp_path):
    code = """
try:
    print("ready", flush=True)
    with CacheWriter(sys.argv[1], IDENTITY, {}) as writer:
        for number in itertools.count():
            add(writer, number)
except KeyboardInterrupt:
    gc.collect()
    print("interrupted")
"""
    started = [(child(code, tmp_path / str(n)), n) for n in range(3)]
    for process, n in started:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.07 * n)
        process.send_signal(signal.SIGINT)
    for process, n in started:
        out, err = process.communicate(timeout=60)
        assert (out, err) == ("interrupted\n", "")
        assert not [name for name in files(tmp_path / str(n)) if name.endswith(".tmp")]
        cache = PriorCache(tmp_path / str(n), IDENTITY)
        every = np.array([b"%016d" % i for i in range(len(cache))], "S16")
        cache.read(every, [runs(1, 20_001)] * len(cache), CORE)
