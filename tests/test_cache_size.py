"""Time, memory and bytes of a large cache. Limits are far from what was measured."""

import time
import tracemalloc

import numpy as np
import pytest

from prift.cache import PriorCache
from prift.writer import CacheWriter
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


def realistic(n, rng):
    """Statistics as of a fair model: two tokens in three are its first choice."""
    top = rng.random(n) < 0.66
    rank = np.where(top, 1, 2 + rng.pareto(0.8, n).clip(0, 1e5)).astype(np.int32)
    tail = 0.7 * np.log(rank) + rng.gamma(2, 0.8, n)
    mass = rng.gamma(0.7, 1.5, n) + 1e-3
    return {
        "logprob": -np.where(top, rng.gamma(0.5, 0.6, n), tail).astype(np.float32),
        "log_mass_rank": -np.where(top, 0, mass).astype(np.float32),
        "rank": rank,
        "n_tie": np.where(rng.random(n) < 1e-3, 2, 1).astype(np.int32),
        "entropy": rng.gamma(0.6, 2.0, n).astype(np.float32),
    }


def test_a_token_takes_less_than_nine_and_a_half_bytes_and_is_read_fast(tmp_path):
    rng = np.random.default_rng(0)
    rows, per = 5_000, 150
    keys = np.frombuffer(rng.bytes(16 * rows), "S16")
    stats = realistic(rows * per, rng)
    wanted = [runs(20, 20 + per)] * rows
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        for i, key in enumerate(keys):
            own = slice(i * per, (i + 1) * per)
            writer.add(key, 20 + per, wanted[i], {n: v[own] for n, v in stats.items()})
    (part,) = fx.parts(tmp_path)
    assert part.stat().st_size / (rows * per) < 9.5
    cache = PriorCache(tmp_path, IDENTITY)
    order = rng.permutation(rows)
    cache.read(keys[:1], wanted[:1], CORE)
    started = time.process_time()
    found = cache.read(keys[order], wanted, CORE)
    seconds = time.process_time() - started
    assert rows * per / seconds > 1e6  # ten million where this was written
    for name in CORE:
        assert np.array_equal(found[name].reshape(rows, per), stats[name].reshape(rows, per)[order])
