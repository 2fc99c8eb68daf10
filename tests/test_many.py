"""Several processes that precompute into one cache at once, none of them told of the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers as tf

from prift.cache import PriorCache, list_priors
from prift.precompute import PrecomputeOptions, precompute
from prift.request import request
from prift.stats import CORE
from prift.store.claims import Claims
from prift.store.notes import CLAIMS
from prift.store.parts import check_hash
from prift.store.process import signature
from prift.store.remote import open_root
from tests.lab import Lab

FORKED = """
import json, os, signal, sys, traceback
from pathlib import Path
from prift import turns
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from prift.precompute import PrecomputeOptions, precompute
import prift.precompute as module
model, data, cache, out = sys.argv[1:5]
deaths = json.loads(sys.argv[5])  # process -> the window in which it kills itself
options = PrecomputeOptions(window_rows=10, batch_tokens=200)
count = int(sys.argv[6])
go, start = os.pipe()

def run(number):
    os.close(start)
    os.read(go, 1)  # returns once the parent has closed its end
    said, score, windows = [], module.score_plan, []
    def dying(*given):
        windows.append(1)
        if len(windows) == deaths.get(str(number)):
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*given)
    module.score_plan = dying
    text = TextOptions(max_length=60)
    result = precompute(model, DataSpec((data,), text=text), cache, options, said.append)
    Path(out, str(number)).write_text(json.dumps({"scored": result.scored, "said": said}))

children = []
for number in range(count):
    pid = os.fork()
    if pid == 0:
        try:
            run(number)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(pid)
os.close(go)
os.close(start)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))
"""


def at_once(lab: Lab, count: int, deaths: dict | None = None) -> tuple[list[int], list[dict]]:
    """So many processes that begin together: (exit codes, what those that ended well tell)."""
    out = lab.root / "out"
    out.mkdir()
    words = [lab.model, lab.data, lab.cache, str(out), json.dumps(deaths or {}), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", FORKED, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert all(code in (0, -9) for code in codes), done.stderr
    told = [json.loads((out / str(n)).read_text()) for n, code in enumerate(codes) if not code]
    return codes, told


def keys_of(lab: Lab) -> list[bytes]:
    """Of every row that is stored, in whole parts."""
    found = []
    for part in Path(lab.cache).glob("*/parts/[!.]*.parquet"):
        check_hash(part)
        found += [key.as_py() for key in pq.read_table(part)["key"]]
    return found


def stored(lab: Lab) -> dict[str, np.ndarray]:
    (identity,) = list_priors(lab.cache).values()
    examples, _ = lab.spec().load(lab.model, tf.AutoConfig.from_pretrained(lab.model))
    wanted = request(examples)
    return PriorCache(lab.cache, identity).read(wanted.keys, wanted.spans, CORE)


def assert_whole(lab: Lab, tmp_path: Path) -> None:
    """Every sequence once, with the statistics of a run alone; nothing beside the parts."""
    alone = Lab(tmp_path / "alone", rows=100)
    alone.precompute()
    found = keys_of(lab)
    assert sorted(found) == sorted(set(found)) == sorted(keys_of(alone))
    for name in ("logprob", "entropy"):
        np.testing.assert_allclose(stored(lab)[name], stored(alone)[name], atol=1e-5)
    names = {path.name for path in Path(lab.cache).glob("*/*")}
    assert names == {"parts", "prior.json"}


def test_two_processes_at_once_score_everything_once(tmp_path):
    lab = Lab(tmp_path / "lab", rows=100)
    codes, told = at_once(lab, 2)
    assert codes == [0, 0]
    assert sum(one["scored"] for one in told) == len(keys_of(lab))
    assert_whole(lab, tmp_path)


def test_eight_processes_two_of_which_are_killed(tmp_path):
    """No row is lost and none is torn; on one machine none is even scored twice and kept."""
    lab = Lab(tmp_path / "lab", rows=100)
    codes, _ = at_once(lab, 8, {"0": 1, "5": 2})
    # One that is killed in its n-th window has to get so many.
    assert codes.count(-9) <= 2 and codes.count(0) >= 6
    assert_whole(lab, tmp_path)
    assert not list(Path(lab.cache).rglob("*.tmp"))


WINDOWS = 4


@pytest.fixture
def held(tmp_path):
    """A lab whose data are four windows, and a function that claims some of them for an owner."""
    lab = Lab(tmp_path / "lab", rows=40)
    names = []
    take = Claims.take

    class Watch(Claims):
        def take(self, window):
            names.append(window)
            return take(self, window)

    import prift.precompute as module

    before = module.Claims
    module.Claims = Watch
    try:
        probe = Lab(tmp_path / "probe", rows=40)
        result = precompute(
            probe.model, probe.spec(), probe.cache, PrecomputeOptions(window_rows=10), str
        )
    finally:
        module.Claims = before
    assert len(names) == WINDOWS
    root, prior = open_root(lab.cache), result.prior

    def claim(numbers, owner):
        for number in numbers:
            assert root.claim(prior, f"{names[number]}.0-of-1", owner)

    def release(numbers):
        for number in numbers:
            root.release(prior, f"{names[number]}.0-of-1")

    return lab, claim, release


def scored_by(lab: Lab, on_line=lambda line: None) -> tuple[int, list[str]]:
    said = []

    def say(line):
        said.append(line)
        on_line(line)

    options = PrecomputeOptions(window_rows=10)
    return precompute(lab.model, lab.spec(), lab.cache, options, say).scored, said


def test_windows_of_a_live_process_are_waited_for_and_then_scored_if_it_did_not(held):
    lab, claim, release = held
    claim([1, 3], f"{signature()} another")
    before = []

    def waiting(line):
        if line.startswith("waiting for"):
            before.append(len(keys_of(lab)))
            release([1, 3])

    scored, said = scored_by(lab, waiting)
    assert scored == 40 == len(set(keys_of(lab))) == len(keys_of(lab))
    assert len(before) == 1 and f"process {os.getpid()} of this machine" in " ".join(said)
    assert [line for line in said if "2 windows of the data were left undone" in line]
    assert not list(Path(lab.cache).glob(f"*/{CLAIMS}"))


def test_what_another_stored_meanwhile_is_not_scored_and_the_data_not_read_again(held, tmp_path):
    lab, claim, release = held
    claim([0, 2], f"{signature()} another")
    lab_of_other = Lab(tmp_path / "other", rows=40)
    lab_of_other.precompute()

    def waiting(line):
        if line.startswith("waiting for"):
            for part in Path(lab_of_other.cache).glob("*/parts/*.parquet"):
                target = Path(lab.cache) / part.relative_to(lab_of_other.cache)
                os.link(part, target)
            release([0, 2])

    scored, said = scored_by(lab, waiting)
    assert scored == 20
    assert not [line for line in said if "left undone" in line]


def test_the_claims_of_the_dead_and_of_other_machines_stop_nobody(held):
    lab, claim, _ = held
    machine, pid, started = signature().rsplit("-", 2)
    claim([0, 1], f"{machine}-{pid}-{int(started) - 1} killed")
    claim([2], "elsewhere.f00-1-5 unknown")
    scored, said = scored_by(lab)
    assert scored == 40 == len(set(keys_of(lab)))
    assert not [line for line in said if line.startswith("waiting")]
    assert [line for line in said if "1 windows of the data were left undone" in line]
    left = [path.name for path in Path(lab.cache).glob(f"*/{CLAIMS}/*")]
    assert len(left) == 1  # of the other machine: it may be at it


def test_claims_a_day_old_are_taken_away(held, tmp_path):
    lab, claim, _ = held
    claim([2], "elsewhere.f00-1-5 unknown")
    [note] = Path(lab.cache).glob(f"*/{CLAIMS}/*")
    os.utime(note, (1, 1))
    scored_by(lab)
    assert not note.exists()


def test_data_that_changed_meanwhile_are_refused(held):
    from prift.errors import DataError

    lab, claim, release = held
    claim([1], f"{signature()} another")

    def waiting(line):
        if line.startswith("waiting for"):
            lines = Path(lab.data).read_text().splitlines()
            Path(lab.data).write_text("\n".join(reversed(lines)))
            release([1])

    with pytest.raises(DataError, match="not what they were when this run began"):
        scored_by(lab, waiting)
    assert len(keys_of(lab)) == 30


def test_data_that_shrank_meanwhile_are_refused(held):
    from prift.errors import DataError

    lab, claim, release = held
    claim([3], f"{signature()} another")

    def waiting(line):
        if line.startswith("waiting for"):
            lines = Path(lab.data).read_text().splitlines()
            Path(lab.data).write_text("\n".join(lines[:20]))
            release([3])

    with pytest.raises(DataError, match="not what they were when this run began"):
        scored_by(lab, waiting)
    assert len(keys_of(lab)) == 30


def test_a_window_that_a_third_takes_first_is_waited_for_again(held, monkeypatch):
    lab, claim, release = held
    claim([1], f"{signature()} another")
    wait, waits = Claims.wait, []

    def waiting(self, window, say=None):
        waits.append(window)
        if len(waits) != 2:
            release([1])
        wait(self, window, say)
        if len(waits) == 2:  # it was left undone, and is to be taken here
            claim([1], f"{signature()} third")

    monkeypatch.setattr(Claims, "wait", waiting)
    scored, _ = scored_by(lab)
    assert len(waits) == 3
    assert scored == 40 == len(set(keys_of(lab))) == len(keys_of(lab))
    assert not list(Path(lab.cache).glob(f"*/{CLAIMS}"))


def test_claims_in_an_object_store(s3, tmp_path, monkeypatch):
    """Each of two processes leaves a window that the other has, and removes what it left. To see
    what others have finished, keys alone are read."""
    root = open_root(s3.url())
    with Claims(root, "p") as one, Claims(root, "p") as other:
        assert one.take("v") and not other.take("v") and other.take("w")
        assert one.company() and other.company()
        assert sorted(s3.objects()) == ["cache/p/claims/v.0-of-1", "cache/p/claims/w.0-of-1"]
        assert root.claimant("p", "v.0-of-1").startswith(f"{signature()} ")
        one.release(["v"])
        assert other.take("v")
    assert s3.objects() == {} and root.claimant("p", "v.0-of-1") is None
    lab = Lab(tmp_path, rows=20)
    options = PrecomputeOptions(window_rows=10)
    result = precompute(lab.model, lab.spec(), s3.url(), options, lambda line: None)
    assert result.scored == 20
    assert [name for name in s3.objects() if "claims" in name] == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine's"))
    result = precompute(lab.model, lab.spec(), s3.url(), options, lambda line: None)
    assert result.scored == 0
    assert not list(tmp_path.glob("another machine's/**/*.parquet"))


def test_of_two_that_find_a_dead_claimant_one_takes_its_claim(tmp_path, monkeypatch):
    """The other takes it in the moment between the look at the note and what follows."""
    root = open_root(tmp_path)
    machine, pid, started = signature().rsplit("-", 2)
    assert root.claim("p", "w.0-of-1", f"{machine}-{pid}-{int(started) - 1} killed")
    with Claims(root, "p") as one, Claims(root, "p") as other:
        look, taken = one._lives, []

        def slowly(*args):
            found = look(*args)
            taken.append(other.take("w"))
            return found

        monkeypatch.setattr(one, "_lives", slowly)
        assert not one.take("w") and taken == [True]
        assert root.claimant("p", "w.0-of-1") == other._me
        assert list(root.claims("p")) == ["w.0-of-1"]


def test_processes_with_other_shares_do_not_meet(tmp_path):
    root = open_root(tmp_path)
    with Claims(root, "p", "0/4") as one, Claims(root, "p", "1/4") as other:
        with Claims(root, "p", "0/4") as twin, Claims(root, "p") as whole:
            assert one.take("w") and other.take("w") and not twin.take("w")
            assert not one.company() and not other.company()
            assert twin.company() and whole.company()
            one.release(["w"])
            assert twin.take("w")
    assert root.claims("p") == {} and not (tmp_path / "p").exists()
