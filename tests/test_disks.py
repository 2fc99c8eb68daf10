"""Disks that fill up, or can be written no more, in the middle of a run."""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from prift.cache import PriorCache
from prift.errors import CacheError
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, files, key, keys, runs

ROW = 20_000
NOBODY = 65534


def add(writer, number):
    """A row of random numbers, which no compression makes small: about 160 kB."""
    rng = np.random.default_rng(number)
    floats = {n: rng.random(ROW, np.float32) for n in ("logprob", "log_mass_rank", "entropy")}
    integers = {n: rng.integers(1, 1 << 30, ROW) for n in ("rank", "n_tie")}
    values = {name: ({**floats, **integers})[name] for name in CORE}
    writer.add(key(str(number)), ROW + 1, runs(1, ROW + 1), values)


def kept(root, numbers):
    """Fails unless these rows are there, and no others and nothing unfinished."""
    cache = PriorCache(root, IDENTITY)
    assert len(cache) == len(numbers)
    found = cache.read(keys(*map(str, numbers)), [runs(1, ROW + 1)] * len(numbers), CORE)
    first = np.random.default_rng(numbers[0]).random(ROW, np.float32)
    assert np.array_equal(found["logprob"][:ROW], first)
    assert not [name for name in files(root) if name.startswith(".")]


@contextmanager
def small_disk(place: Path, size: str):
    """A file system in memory of this size; skips where mounting is not permitted."""
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "prift-test", place],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_fills_up(tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        root, done = disk / "cache", []
        with pytest.raises(CacheError, match="No space left on device") as error:
            with CacheWriter(root, IDENTITY, {}) as writer:
                for number in range(99):
                    add(writer, number)
                    writer.flush()
                    done.append(number)
        assert "Finished parts are kept; once there is room" in str(error.value)
        assert 2 <= len(done) < 20
        kept(root, done)
        fx.parts(root)[0].unlink()  # room again
        with CacheWriter(root, IDENTITY, {}) as writer:
            writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))
        assert fx.read(root, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


def test_a_disk_that_is_mounted_for_reading_on_the_way(tmp_path):
    with small_disk(tmp_path / "disk", "9m") as disk:
        root = disk / "cache"
        with pytest.raises(CacheError, match="Read-only file system"):
            with CacheWriter(root, IDENTITY, {}) as writer:
                add(writer, 0)
                writer.flush()
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
                add(writer, 1)
        kept(root, [0])


@contextmanager
def somebody():
    """A folder of, and the rights of, a user whom permissions bind; root's they do not."""
    place = Path(tempfile.mkdtemp(prefix="prift-test-"))
    with CacheWriter(place / "warm", IDENTITY, {}) as writer:  # modules that are imported late
        add(writer, 0)
    kept(place / "warm", [0])
    if bound := not os.geteuid():
        os.chown(place, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield place
    finally:
        if bound:
            os.seteuid(0)
        shutil.rmtree(place)


@pytest.mark.parametrize("open_part", [False, True])
def test_a_folder_that_may_not_be_written_any_more(open_part):
    """With a part begun before, or not."""
    with somebody() as place:
        root = place / "cache"
        with pytest.raises(CacheError, match="Permission denied") as error:
            with CacheWriter(root, IDENTITY, {}) as writer:
                add(writer, 0)
                writer.flush()
                if open_part:
                    add(writer, 1)
                (root / IDENTITY.id / "parts").chmod(0o555)
                add(writer, 2)
        assert "once there is room and permission" in str(error.value)
        cache = PriorCache(root, IDENTITY)
        assert len(cache) == 1
        (root / IDENTITY.id / "parts").chmod(0o755)
        with CacheWriter(root, IDENTITY, {}) as writer:
            add(writer, 1)
        assert len(PriorCache(root, IDENTITY)) == 2


def test_a_cache_that_may_only_be_read_is_read():
    with somebody() as place:
        root = place / "cache"
        with CacheWriter(root, IDENTITY, {}) as writer:
            add(writer, 0)
        for path in (root / IDENTITY.id / "parts", root / IDENTITY.id, root):
            path.chmod(0o555)
        kept(root, [0])
        for path in (root, root / IDENTITY.id, root / IDENTITY.id / "parts"):
            path.chmod(0o755)


def test_a_cache_with_a_part_that_may_not_be_read_says_so():
    with somebody() as place:
        root = place / "cache"
        with CacheWriter(root, IDENTITY, {}) as writer:
            add(writer, 0)
        fx.parts(root)[0].chmod(0)
        with pytest.raises(CacheError, match=f"cannot read .*{fx.parts(root)[0].name}: Permission"):
            PriorCache(root, IDENTITY)


def test_a_disk_for_copies_that_fills_up(s3, tmp_path, monkeypatch):
    with CacheWriter(s3.url(), IDENTITY, {}) as writer:
        for number in range(8):
            add(writer, number)
            writer.flush()
    before = s3.objects()
    with small_disk(tmp_path / "disk", "1m") as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        with pytest.raises(CacheError, match=r"no room for a copy of s3://.* No space left"):
            PriorCache(s3.url(), IDENTITY)
        assert not [f for f in disk.rglob(".*")]
    assert s3.objects() == before
