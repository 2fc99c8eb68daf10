"""`prift precompute` ended by signals at random moments: see tests/kill.py, which needs a process
of its own, from which it forks. `pytest tests/test_kill.py --kills 100` ends 100 runs per signal.
"""

import os
import subprocess
import sys
import time

import pytest

from prift.store.claims import Claims
from prift.store.remote import open_root
from tests.cache_fixtures import IDENTITY


def ended(folder, kills):
    command = [sys.executable, "-m", "tests.kill", "--kills", str(kills), "--folder", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--signal", "KILL", "TERM", "INT"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300 + 60 * kills,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f'"kills": {kills}') == 3


def test_a_run_may_be_ended_at_any_moment(tmp_path, request):
    ended(tmp_path / "kills", request.config.getoption("--kills") or 3)


@pytest.mark.slow
def test_a_run_may_be_ended_at_a_hundred_moments(tmp_path, request):
    ended(tmp_path / "kills", request.config.getoption("--kills") or 100)


def test_a_claim_whose_process_was_killed_before_it_signed_stops_nobody(tmp_path):
    root = open_root(tmp_path)
    root.begin(IDENTITY.id, IDENTITY.json())
    assert root.claim(IDENTITY.id, "window.0-of-1", "")
    assert not Claims(root, IDENTITY.id).take("window")  # it may be about to sign
    (note,) = (tmp_path / IDENTITY.id / "claims").iterdir()
    os.utime(note, (time.time() - 60,) * 2)
    assert Claims(root, IDENTITY.id).take("window")
