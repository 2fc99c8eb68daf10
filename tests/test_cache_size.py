"""Time, memory and bytes of a large cache. Limits are far from what was measured."""

import time
import tracemalloc

import numpy as np
import pytest

from benchmarks.cache import realistic
from prift.cache import PriorCache
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, runs

ROWS = 200_000


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(root, keys) of 200,000 rows of three tokens, two of them scored, in two parts."""
    root = tmp_path_factory.mktemp("many")
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * ROWS), "S16")
    two, whole = fx.stats([1, 2]), runs(1, 3)
    with CacheWriter(root, IDENTITY, {}) as writer:
        for number, key in enumerate(keys):
            writer.add(key, 3, whole, two)
            if number == ROWS // 2:
                writer.flush()
    return root, keys


def test_opening_and_finding_200_000_rows_takes_seconds(many):
    root, keys = many
    asked = np.concatenate([keys, np.frombuffer(np.random.default_rng(1).bytes(16), "S16")])
    wanted = [runs(1, 3)] * (ROWS + 1)
    started = time.process_time()
    found = PriorCache(root, IDENTITY).missing(asked, wanted, CORE)
    assert time.process_time() - started < 2.5  # 0.3 s where this was written
    assert found == [ROWS]


def test_finding_parts_of_rows_is_no_slower(many):
    root, keys = many
    cache = PriorCache(root, IDENTITY)
    started = time.process_time()
    assert cache.missing(keys, [runs(2, 3)] * ROWS, CORE) == []
    assert time.process_time() - started < 2.5


def test_opening_and_asking_take_little_memory_a_row(many):
    root, keys = many
    wanted = [runs(1, 3)] * ROWS
    tracemalloc.start()
    try:
        cache = PriorCache(root, IDENTITY)
        cache.missing(keys, wanted, CORE)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most / ROWS < 400  # 254 bytes where this was written, 68 of which stay
    assert len(cache) == ROWS


@pytest.mark.parametrize(("half", "most"), [(False, 9.5), (True, 5.2)], ids=["float32", "float16"])
def test_a_token_takes_few_bytes_and_is_read_fast(tmp_path, half, most):
    rng = np.random.default_rng(0)
    rows, per = 5_000, 150
    keys = np.frombuffer(rng.bytes(16 * rows), "S16")
    stats = realistic(rows * per, rng)
    wanted = [runs(20, 20 + per)] * rows
    with CacheWriter(tmp_path, IDENTITY, {}, half=half) as writer:
        for i, key in enumerate(keys):
            own = slice(i * per, (i + 1) * per)
            writer.add(key, 20 + per, wanted[i], {n: v[own] for n, v in stats.items()})
    (part,) = fx.parts(tmp_path)
    assert part.stat().st_size / (rows * per) < most
    cache = PriorCache(tmp_path, IDENTITY)
    order = rng.permutation(rows)
    cache.read(keys[:1], wanted[:1], CORE)
    started = time.process_time()
    found = cache.read(keys[order], wanted, CORE)
    seconds = time.process_time() - started
    assert rows * per / seconds > 1e6  # ten million where this was written
    for name in CORE:
        wanted_values = stats[name].reshape(rows, per)[order]
        if half and wanted_values.dtype == np.float32:
            wanted_values = wanted_values.astype(np.float16).astype(np.float32)
        assert np.array_equal(found[name].reshape(rows, per), wanted_values)


def test_what_float16_has_no_room_for_stays_in_float32(tmp_path):
    names = ("logprob", "collision", "expected_rank")
    values = {
        n: np.array([v], np.float32) for n, v in zip(names, (-0.1, 1e-7, 99_999), strict=True)
    }
    with CacheWriter(tmp_path, IDENTITY, {}, half=True) as writer:
        writer.add(fx.key("one"), 2, runs(1, 2), values)
    found = PriorCache(tmp_path, IDENTITY).read(fx.keys("one"), [runs(1, 2)], names)
    assert found["logprob"] == np.float16(-0.1)
    assert found["collision"] == np.float32(1e-7) and found["expected_rank"] == 99_999
