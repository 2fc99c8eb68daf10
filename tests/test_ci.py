""".ci/summary.py: one line of sums, and an exit code, from the reports of real pytest runs."""

import subprocess
import sys
from pathlib import Path

import pytest

SUMMARY = Path(__file__).parents[1] / ".ci" / "summary.py"
TESTS = {
    "good": "def test_a(): pass\ndef test_b(): pass\n",
    "skipped": "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no reason')\n",
    "failed": "def test_a(): assert 0\ndef test_b(): pass\n",
    "broken": "import pytest\n@pytest.fixture\ndef f(): assert 0\ndef test_a(f): pass\n",
    "empty": "",
    "all_skipped": "import pytest\ndef test_a(): pytest.skip('no reason')\n",
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The folder of one report of each of TESTS."""
    folder = tmp_path_factory.mktemp("reports")
    for name, text in TESTS.items():
        (folder / f"test_{name}.py").write_text(text)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--junitxml={name}.xml", f"test_{name}.py", "--rootdir", str(folder)]
        subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    return folder


@pytest.mark.parametrize(
    ("names", "code", "line"),
    [
        (["good"], 0, "2 passed in"),
        (["good", "skipped"], 0, "3 passed, 1 skipped in"),
        (["good", "failed"], 1, "1 failed, 3 passed in"),
        (["broken", "good"], 1, "2 passed, 1 error in"),
        (["good", "absent"], 1, "2 passed, 1 error in"),
        (["empty"], 1, "0 passed in"),
        (["good", "empty"], 1, "2 passed in"),
        (["good", "all_skipped"], 1, "2 passed, 1 skipped in"),
    ],
)
def test_sums_and_exit_code(reports, names, code, line):
    command = [sys.executable, SUMMARY, *(reports / f"{name}.xml" for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(line) and last.endswith("s"), done.stdout
