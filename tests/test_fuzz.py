"""Malformed parts end in a CacheError, whatever is wrong with them: see tests/fuzz.py."""

import json
import os
import subprocess
import sys

import pytest


def fuzz(folder, files, seed):
    """In a process of its own, which a crash ends by a signal."""
    command = [sys.executable, "-m", "tests.fuzz", "--files", files, "--seed", seed]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        [str(word) for word in (*command, "--folder", folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120 + files,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    found = json.loads(done.stdout)
    read = [found[name] for name in ("index", "groups", "cache", "whole")]
    assert files > read[0] > read[1] >= read[2] > read[3] > files / 20  # all sorts came up


def test_mutated_parts_are_errors(tmp_path):
    fuzz(tmp_path / "fuzz", 400, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_thousands_of_mutated_parts_are_errors(tmp_path, seed):
    fuzz(tmp_path / "fuzz", 2000, seed)
