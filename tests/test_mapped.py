"""Arrays that processes share: one copy, written once, gone with the last that holds it."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from prift.errors import CacheError, PriftError
from prift.mapped import MappedArrays, mapped_arrays

VALUES = {"logprob": np.arange(-500_000, 0, dtype=np.float32), "rank": np.arange(3, dtype=np.int32)}

ANOTHER = """
import sys, time
import numpy as np
from prift.mapped import mapped_arrays

def compute():
    print("computed", flush=True)
    time.sleep(float(sys.argv[2]))
    return {"rank": np.arange(3)}

held = mapped_arrays(sys.argv[1], compute)
print(held["rank"].tolist(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Where the folders are."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / f"prift-{os.getuid()}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def another(key: str, seconds: float = 0.0) -> subprocess.Popen:
    """A process that holds `key` until its input ends; computing takes it so long."""
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", ANOTHER, key, str(seconds)]
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)


def never() -> dict:
    raise AssertionError("computed though it is there")


def test_arrays_come_back_as_they_were_and_cannot_be_written_to(home):
    held = mapped_arrays("k", lambda: VALUES)
    assert dict(held).keys() == VALUES.keys() and len(held) == 2
    for name, array in VALUES.items():
        assert np.array_equal(held[name], array) and held[name].dtype == array.dtype
        with pytest.raises(ValueError, match="read-only"):
            held[name][0] = 1
    held.close()


def test_the_folder_is_private_and_goes_with_the_last_that_holds_it(home):
    first, second = mapped_arrays("k", lambda: VALUES), mapped_arrays("k", never)
    assert home.stat().st_mode & 0o077 == 0 and names(home) == ["k"]
    first.close()
    first.close()
    assert names(home) == ["k"] and second["rank"].tolist() == [0, 1, 2]
    second.close()
    assert names(home) == []
    assert second["rank"].tolist() == [0, 1, 2]  # what is mapped stays until it is dropped


def test_what_is_forgotten_is_let_go(home):
    held = mapped_arrays("k", lambda: VALUES)
    del held
    assert names(home) == []


def test_another_process_waits_for_the_one_that_computes(home):
    processes = another("k", 1.0), another("k", 1.0)
    first = [process.stdout.readline() for process in processes]  # both hold it then, or will
    for process in processes:
        process.stdin.close()
    said = first + [line for process in processes for line in process.stdout]
    assert sorted(said) == ["[0, 1, 2]\n", "[0, 1, 2]\n", "computed\n"]
    assert [process.wait() for process in processes] == [0, 0] and names(home) == []


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_of_a_live_one(home):
    dead, live = another("dead"), another("live")
    for process in (dead, live):
        assert [process.stdout.readline() for _ in range(2)] == ["computed\n", "[0, 1, 2]\n"]
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert names(home) == ["dead", "live"]
    held = mapped_arrays("mine", lambda: VALUES)
    assert names(home) == ["live", "mine"]
    held.close()
    live.stdin.close()
    live.wait()
    assert names(home) == []


def test_what_a_killed_run_left_is_computed_anew(home):
    """It may be half written, or never have reached the disk."""
    dead = another("k")
    assert [dead.stdout.readline() for _ in range(2)] == ["computed\n", "[0, 1, 2]\n"]
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    (home / "k" / "arrays" / "rank.npy").write_bytes(b"")
    held = mapped_arrays("k", lambda: {"rank": np.array([7])})
    assert held["rank"].tolist() == [7]
    held.close()


def test_an_error_leaves_nothing(home):
    def fails():
        raise CacheError("damaged")

    with pytest.raises(CacheError, match="damaged"):
        mapped_arrays("k", fails)
    assert names(home) == []


def test_no_place_for_them_names_the_remedy(home, monkeypatch):
    blocked = home.parent / "file"
    blocked.write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(blocked))
    with pytest.raises(PriftError, match="(?s)cannot be decoded into .*file.*TMPDIR"):
        mapped_arrays("k", lambda: VALUES)


def test_a_disk_that_is_full_names_the_remedy(home):
    """In a process of its own, whose files may not grow beyond 1 MB."""
    code = (
        "import resource, signal; import numpy as np; from prift.mapped import mapped_arrays\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "mapped_arrays('k', lambda: {'logprob': np.zeros(1 << 20)})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "PriftError: the statistics cannot be decoded into" in done.stderr
    assert names(home) == []


class Mapping(torch.utils.data.Dataset):
    """Each item: KiB of the mapped files that the worker holds, [resident, its own copies]."""

    def __init__(self, arrays: MappedArrays):
        self.arrays = arrays

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        assert float(self.arrays["logprob"].sum()) < 0  # touches every page
        resident = own = 0
        inside = False
        for line in open("/proc/self/smaps"):
            head = line.split()[0]
            if not head.endswith(":"):
                inside = f"/prift-{os.getuid()}/" in line
            elif inside and head == "Rss:":
                resident += int(line.split()[1])
            elif inside and head == "Anonymous:":
                own += int(line.split()[1])
        return os.getpid(), resident, own


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_share_the_mapping(home, start):
    held = mapped_arrays("k", lambda: VALUES)
    assert len(pickle.dumps(held)) < 1000
    loader = torch.utils.data.DataLoader(
        Mapping(held), batch_size=None, num_workers=2, multiprocessing_context=start
    )
    found = [[int(x) for x in item] for item in loader]
    assert os.getpid() not in [pid for pid, _, _ in found]
    for _, resident, own in found:
        assert resident > 1500 and own == 0  # 2 MB of float32
    assert names(home) == ["k"]  # workers that end take nothing with them
    held.close()
    assert names(home) == []
