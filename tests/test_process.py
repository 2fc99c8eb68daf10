"""Whether another process lives, from its name alone; what killed writers left behind."""

import os
import re
import subprocess
import sys
import time

import pytest

from prift.store import process as module
from prift.store.newfile import NewFile, remove_stale
from prift.store.process import alive, signature

SAYS = "from prift.store.process import signature\nprint(signature(), flush=True)\ninput()"


@pytest.fixture
def other():
    """A process that has said its name and waits for a line: (process, name)."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAYS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_a_process_lives_until_it_ends(other):
    process, name = other
    assert alive(name) is True and name != signature()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and nobody was told yet
    assert alive(name) is False
    process.wait()
    assert alive(name) is False


def test_this_process_lives_and_one_with_its_number_before_it_does_not():
    assert alive(signature()) is True
    machine, pid, started = re.fullmatch(r"(.*)-(\d+)-(\d+)", signature()).groups()
    assert int(pid) == os.getpid()
    assert alive(f"{machine}-{pid}-{int(started) - 1}") is False


def test_of_other_machines_nothing_is_known():
    assert alive("elsewhere.f00-1-5") is None
    for odd in ("", "-", "a-b", "a-b-c", signature().rpartition("-")[0], f"{signature()}-x"):
        assert alive(odd) is None


def test_another_machine_of_the_same_name_is_another(tmp_path, monkeypatch, other):
    """All machines' first namespace of process ids has the same number."""
    process, name = other
    process.kill()
    process.wait()
    assert alive(name) is False
    boot = tmp_path / "boot_id"
    boot.write_text("01234567-89ab-cdef-0123-456789abcdef\n")
    monkeypatch.setattr(module, "_BOOT", str(boot))
    module._machine.cache_clear()
    try:
        assert alive(name) is None
        assert alive(signature()) is True
        monkeypatch.setattr(module, "_BOOT", str(tmp_path / "none"))
        module._machine.cache_clear()
        assert alive(signature()) is True
    finally:
        module._machine.cache_clear()


def test_what_dead_writers_began_is_removed_and_what_live_ones_began_never(tmp_path, other):
    process, name = other
    machine = "elsewhere.f00-77-1234"
    kept = NewFile(tmp_path)
    mine = set(tmp_path.iterdir())
    live = tmp_path / f".{name}-0badcafe.tmp"
    fresh, old = (tmp_path / f".{machine}-{n}.tmp" for n in ("00000001", "00000002"))
    former = tmp_path / ".host-12-0badcafe.tmp"  # named without a start
    part = tmp_path / "20260101T000000Z-00.parquet"
    for path in (live, fresh, old, former, part):
        path.write_bytes(b"x")
    long_ago = time.time() - 25 * 3600
    for path in (live, old, former, part, *mine):
        os.utime(path, (long_ago, long_ago))
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {live, fresh, part, *mine}
    process.kill()
    process.wait()
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {fresh, part, *mine}
    kept.publish("whole")
    assert set(tmp_path.iterdir()) == {fresh, part, tmp_path / "whole"}
