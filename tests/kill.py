"""Ends `prift precompute` at random moments and looks at what it leaves.

    python -m tests.kill --kills 100 --signal KILL TERM INT --folder /tmp/x

A moment is a number of calls of Python and C functions, drawn from those of a whole run, or from
those made by the modules that write: the process ends itself there, so that no clock is involved
and the machine may be as busy as it likes. Runs are forked from a process that has imported all.
Prints what happened; raises AssertionError for anything that is not as it should be.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from prift import precompute
from prift.cache import PriorCache, list_priors
from prift.stats import CORE
from prift.store.roots import digest_of_file
from prift_cli import main
from tests import cli_fixtures as cli

_ROWS = 48  # six windows of eight rows
_CHAIN = 4  # runs of one cache that are ended before one may finish
_WRITES = ("store/newfile", "store/writer", "store/roots", "store/claims", "turns", "scoring")
_WRITING = re.compile(rf"/prift/({'|'.join(_WRITES)})\.py$")
_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{32}\.parquet")
_CODES = {"KILL": -signal.SIGKILL, "TERM": 128 + signal.SIGTERM, "INT": 128 + signal.SIGINT}


def forked(work: Callable[[], int], log: Path) -> int:
    """Return code of `work` in a process of its own; negative: the signal that ended it."""
    if not (child := os.fork()):
        code = 99
        try:
            with open(log, "w") as said:
                os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Moment:
    """Counts calls in all threads from `begin` on, and sends this process a signal at one of them.

    calls   which one; None: never
    writes  counts only those made by the modules that write
    """

    def __init__(self, calls: int | None, writes: bool, number: int = signal.SIGKILL):
        self._calls, self._writes, self._number = calls, writes, number
        self._all, self._written = itertools.count(1), itertools.count(1)
        self.seen = [0, 0]
        self.files: set[str] = set()

    def begin(self) -> None:
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def _called(self, frame, event: str, argument) -> None:
        if not event.endswith("call"):
            return
        self.seen[0] = count = next(self._all)
        if writes := _WRITING.search(frame.f_code.co_filename):
            self.seen[1] = written = next(self._written)
            self.files.add(writes[1])
        if self._writes:
            count = written if writes else -1
        if count == self._calls:
            os.kill(os.getpid(), self._number)


def run(folder: Path, moment: Moment, seconds: float) -> int:
    """One `prift precompute` to the end, in this process."""
    precompute.WINDOW_ROWS = 8
    work = precompute.precompute

    def begun(*arguments):
        moment.begin()  # by now signals are answered
        try:
            return work(*arguments)
        finally:
            sys.setprofile(None)

    precompute.precompute = begun
    command = ["precompute", "--model", folder / "model", "--data", folder / "rows.jsonl"]
    command += ["--cache", folder / "cache", "--part-seconds", seconds, "--batch-tokens", 96]
    try:
        main([str(word) for word in command])
    except SystemExit as end:
        (folder / "seen.json").write_text(json.dumps([moment.seen, sorted(moment.files)]))
        return end.code or 0
    return 98


def whole(folder: Path) -> int:
    """How many rows there are; fails where a visible part is not whole."""
    parts = [p for p in (folder / "cache").glob("*/parts/*") if not p.name.startswith(".")]
    for part in parts:
        assert _NAME.fullmatch(part.name), part
        assert digest_of_file(part)[:32] == part.stem[-32:], part
    priors = list_priors(folder / "cache")
    rows = 0
    for identity in priors.values():
        cache = PriorCache(folder / "cache", identity)
        for index in cache.parts.values():
            ends = np.cumsum(index.counts)
            wanted = [index.spans[e - c : e] for e, c in zip(ends, index.counts, strict=True)]
            cache.read(index.keys, wanted, CORE)
        rows += len(cache)
    return rows


def content(folder: Path) -> dict[bytes, tuple[bytes, dict[str, np.ndarray]]]:
    """Of each key its spans and statistics; fails where a key has two rows."""
    (identity,) = list_priors(folder / "cache").values()
    cache, found = PriorCache(folder / "cache", identity), {}
    for index in cache.parts.values():
        ends = np.cumsum(index.counts)
        for key, end, count in zip(index.keys, ends, index.counts, strict=True):
            assert key not in found, f"{key!r} was scored twice"
            spans = index.spans[end - count : end]
            values = cache.read(np.array([key], "S16"), [spans], CORE)
            found[key] = spans.tobytes(), values
    return found


def finished(folder: Path, reference: Path) -> int:
    """Fails where the finished cache is not that of an uninterrupted run; 0."""
    found, right = content(folder), content(reference)
    assert found.keys() == right.keys()
    for key, (spans, values) in found.items():
        assert spans == right[key][0]
        for name in ("logprob", "log_mass_rank", "entropy"):
            np.testing.assert_allclose(values[name], right[key][1][name], rtol=1e-4, atol=1e-5)
        for name in ("rank", "n_tie"):
            assert np.array_equal(values[name], right[key][1][name])
    assert not list((folder / "cache").rglob("claims/*"))
    return 0


def prepared(folder: Path, reference: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    if reference is None:
        cli.make_model(folder / "model")
        words = [f"{w} {v}" for w in ("Beep", "Natalia", "tool") for v in range(_ROWS // 3)]
        rows = [{"prompt": f"How many {w}?", "completion": f" {len(w) * 7}."} for w in words]
        cli.write_rows(folder / "rows.jsonl", rows)
    else:
        for name in ("model", "rows.jsonl"):
            (folder / name).symlink_to(reference / name)
    return folder


def torture(folder: Path, kills: int, name: str, seed: int) -> dict[str, int]:
    """Ends `kills` runs with SIG<name>; counts what happened."""
    draw = random.Random(seed)
    log = folder / "log.txt"
    reference = prepared(folder / "reference")

    def checked(code: int, wanted: int) -> int:
        assert code == wanted, f"seed {seed}: {code} instead of {wanted}:\n{log.read_text()}"
        return code

    checked(forked(lambda: run(reference, Moment(None, False), 0.0), log), 0)
    calls, files = json.loads((reference / "seen.json").read_text())
    assert set(files) == set(_WRITES), f"no call was seen in {set(_WRITES) - set(files)}"
    done = {"kills": 0, "finished_before": 0, "caches": 0, "resumed": 0}
    while done["kills"] < kills:
        place = prepared(folder / f"run{done['caches']}", reference)
        done["caches"] += 1
        for _ in range(min(_CHAIN, kills - done["kills"])):
            writes = draw.random() < 0.6
            seconds = draw.choice([0.0, 0.0, 60.0])
            moment = Moment(draw.randint(1, calls[writes]), writes, getattr(signal, f"SIG{name}"))
            code = forked(lambda: run(place, moment, seconds), log)  # noqa: B023
            done["kills" if code else "finished_before"] += 1
            checked(code, _CODES[name] if code else 0)
            left = [p.name for p in (place / "cache").rglob(".*")]
            assert name == "KILL" or not left, f"{left}:\n{log.read_text()}"
            checked(forked(lambda: whole(place) and 0, log), 0)  # noqa: B023
            if not code:
                break
        checked(forked(lambda: run(place, Moment(None, False), 60.0), log), 0)  # noqa: B023
        done["resumed"] += "0 to score" not in log.read_text()
        checked(forked(lambda: finished(place, reference), log), 0)  # noqa: B023
    return done


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=_CODES, nargs="+", default=["KILL"])
    parser.add_argument("--folder", type=Path, required=True, help="must not exist")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    return parser.parse_args()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    asked = parsed()
    for name in asked.signal:
        print(name, json.dumps(torture(asked.folder / name, asked.kills, name, asked.seed)))
