"""The commands that change the files of a cache: what they print, and how they end."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests import cli_fixtures as cli
from tests.cache_fixtures import IDENTITY, key, runs

INTERRUPTED = """
import os, signal, sys, time
time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGINT)
import prift_cli
prift_cli.main()
"""


@pytest.fixture
def place(tmp_path):
    """A cache of five parts."""
    for n in range(5):
        part = fx.add(tmp_path / "cache", [(f"row {n}", 4, runs(1, 4), [n + 1, n + 2, n + 3])])
        fx.renamed(part, f"20250101T00000{n}Z")
    return tmp_path / "cache"


def whole(place):
    wanted = {f"row {n}": runs(1, 4) for n in range(5)}
    assert fx.read(place, wanted) == {"rank": [n + i for n in range(5) for i in (1, 2, 3)]}


def test_compact_says_what_became_of_what(place):
    said = cli.succeeded(cli.prift("cache", "compact", "--cache", place, "--grace", "0"))
    assert f"{IDENTITY.id}: 5 of 5 parts" in said
    assert "became 1 (" in said
    assert "0 duplicate rows left out" in said
    said = cli.succeeded(cli.prift("cache", "compact", IDENTITY.id[:5], "--cache", place))
    assert said == f"{IDENTITY.id}: nothing to merge in 1 parts\n"
    whole(place)


def test_compact_as_json(place):
    said = cli.succeeded(cli.prift("cache", "compact", "--cache", place, "--grace", "0s", "--json"))
    (one,) = json.loads(said)["priors"]
    assert (one["prior"], one["merged"], one["made"]) == (IDENTITY.id, 5, 1)


def test_ctrl_c_in_the_wait_leaves_both_and_the_next_finishes(place):
    words = ["cache", "compact", "--cache", str(place), "--grace", "2h"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "5 parts are merged; in 7,200 s" in done.stderr
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr
    assert len(fx.parts(place)) == 6
    cli.succeeded(cli.prift("cache", "compact", "--cache", place, "--grace", "0"))
    assert len(fx.parts(place)) == 1
    whole(place)


@pytest.mark.parametrize("given", ["soon", "-1", "5 weeks", ""])
def test_a_grace_that_is_no_time_is_refused(place, given):
    cli.refused(
        cli.prift("cache", "compact", "--cache", place, "--grace", given), "no duration", code=2
    )


def test_what_only_a_newer_prift_reads_is_passed_over(place):
    newer = replace(IDENTITY, stats_version=999)
    with CacheWriter(place, newer, {}) as writer:
        for n in range(2):
            writer.add(key(f"{n}"), 4, runs(1, 4), fx.stats([1, 2, 3]))
            writer.flush()
    said = cli.succeeded(cli.prift("cache", "compact", "--cache", place, "--grace", "0"))
    assert f"prior {newer.id} is left as it is: it was written by a newer prift" in said
    assert len(fx.parts(place)) == 1
    cli.refused(cli.prift("cache", "compact", newer.id, "--cache", place), "upgrade prift")


def test_copy_says_what_came_and_what_was_there(place, tmp_path):
    target = tmp_path / "target"
    said = cli.succeeded(cli.prift("cache", "copy", place, target))
    assert f"{IDENTITY.id}: 5 parts copied" in said and "0 of 5 were there" in said
    said = cli.succeeded(cli.prift("cache", "copy", place, f"file://{target}", "--json"))
    (one,) = json.loads(said)["priors"]
    assert (one["there"], one["copied"]) == (5, 0)
    whole(target)


def test_copy_to_a_store(place, s3):
    said = cli.succeeded(cli.prift("cache", "copy", place, s3.url(), "--prior", IDENTITY.id))
    assert "5 parts copied" in said
    assert len([name for name in s3.objects() if name.endswith(".parquet")]) == 5


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_damaged_part_ends_copy_with_an_error_behind_all_others(place, tmp_path, more):
    bad = fx.parts(place)[1]
    bad.write_bytes(bad.read_bytes()[:-1] + b"?")
    done = cli.prift("cache", "copy", place, tmp_path / "target", *more)
    cli.refused(done, "1 parts were not copied", bad.name)
    assert len(fx.parts(tmp_path / "target")) == 4
    if more:
        (one,) = json.loads(done.stdout)["priors"]
        assert (one["copied"], len(one["damaged"])) == (4, 1)


@pytest.mark.parametrize("command", [["compact", "--cache"], ["copy"]])
def test_where_nothing_lies_that_is_said(tmp_path, command):
    more = [tmp_path / "target"] if command == ["copy"] else []
    cli.refused(cli.prift("cache", *command, tmp_path / "none", *more), "holds no prior")
    assert not list(tmp_path.iterdir())
