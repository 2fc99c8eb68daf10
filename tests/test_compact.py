"""Compaction: readers get the same bits before, while and after; nothing is lost, whoever dies."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.cache import PriorCache
from prift.errors import CacheError
from prift.store import compact as compact_module
from prift.store import merging as merging_module
from prift.store import spans
from prift.store.compact import compact
from prift.store.remote import open_root
from prift.store.roots import Root
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, key, keys, runs

FEW = ("logprob", "rank")
CHILD = """
import os, signal, sys
from prift.store.compact import compact
from prift.store.roots import Root
from pathlib import Path
"""


def add(root, rows, stamp, names=CORE, half=False, facts=None):
    """One part of rows (key text, runs, first rank), whose values say where they come from."""
    with CacheWriter(root, IDENTITY, {"prift": json.dumps(facts or {})}, half=half) as writer:
        before = set(fx.parts(root))
        for name, runs_, rank in rows:
            values = fx.stats(np.arange(rank, rank + spans.count(runs_)), names)
            writer.add(key(name), 12, runs_, values)
    (path,) = set(fx.parts(root)) - before
    return fx.renamed(path, stamp)


def small(root, count=5):
    """Parts of a row each, a second apart."""
    return [
        add(root, [(f"row {n}", runs(1, 4), 10 * n + 1)], f"20250101T00000{n}Z")
        for n in range(count)
    ]


def small_is_whole(root, count=5):
    wanted = {f"row {n}": runs(1, 4) for n in range(count)}
    ranks = [10 * n + i for n in range(count) for i in (1, 2, 3)]
    assert fx.read(root, wanted) == {"rank": ranks}


def test_many_parts_become_one(tmp_path):
    old = small(tmp_path)
    (done,) = compact(Root(tmp_path), grace=0)
    (new,) = fx.parts(tmp_path)
    assert new.name.startswith("20250101T000004Z-")
    assert (done.parts, done.merged, done.made, done.duplicates, done.left) == (5, 5, 1, 0, 0)
    assert done.made_bytes == new.stat().st_size < done.bytes == done.merged_bytes
    assert not {path.name for path in old} & set(fx.files(tmp_path))
    assert fx.files(tmp_path) == [new.name, "prior.json"]
    small_is_whole(tmp_path)
    (again,) = compact(Root(tmp_path), grace=0)
    assert (again.merged, again.made) == (0, 0)
    assert fx.parts(tmp_path) == [new]


def test_old_parts_stay_for_the_grace_and_a_reader_from_before_finds_the_new(tmp_path):
    small(tmp_path)
    reader, waited = PriorCache(tmp_path, IDENTITY), []

    def wait(seconds):
        waited.append((seconds, len(fx.parts(tmp_path))))

    compact(Root(tmp_path), grace=7.0, wait=wait)
    assert waited == [(7.0, 6)]
    found = reader.read(keys("row 3"), [runs(1, 4)], ("rank",))["rank"]
    assert found.tolist() == [31, 32, 33]


def test_full_parts_stay_and_the_target_cuts(tmp_path):
    small(tmp_path, 9)  # of 3 tokens each
    full = add(tmp_path, [("full", runs(1, 10), 500)], "20250102T000000Z")
    compact(Root(tmp_path), grace=0, target=9)
    times = [path.name.partition("-")[0] for path in fx.parts(tmp_path)]
    assert times == [f"2025010{t}Z" for t in ("1T000002", "1T000005", "1T000008", "2T000000")]
    assert full in fx.parts(tmp_path)
    small_is_whole(tmp_path, 9)
    before = fx.parts(tmp_path)
    compact(Root(tmp_path), grace=0, target=9)
    assert fx.parts(tmp_path) == before


def test_row_groups_are_made_anew(tmp_path, monkeypatch):
    small(tmp_path, 8)
    monkeypatch.setattr("prift.store.writer._ROW_GROUP_TOKENS", 9)
    compact(Root(tmp_path), grace=0)
    (new,) = fx.parts(tmp_path)
    meta = pq.read_metadata(new)
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [3, 3, 2]
    small_is_whole(tmp_path, 8)


def test_what_is_covered_by_an_earlier_row_goes(tmp_path):
    add(tmp_path, [("one", runs(1, 3), 10)], "20250101T000000Z")
    add(tmp_path, [("one", runs(1, 6), 20)], "20250101T000001Z")
    add(tmp_path, [("one", runs(2, 6), 30), ("one", runs(1, 3), 40)], "20250101T000002Z")
    (done,) = compact(Root(tmp_path), grace=0)
    assert done.duplicates == 2
    assert fx.read(tmp_path, {"one": runs(1, 2)}) == {"rank": [10]}
    assert fx.read(tmp_path, {"one": runs(2, 5)}) == {"rank": [21, 22, 23]}


def test_other_statistics_are_no_bridge(tmp_path):
    """A B A: the second A may not overtake B, whose row readers used."""
    add(tmp_path, [("other", runs(1, 3), 10)], "20250101T000000Z")
    add(tmp_path, [("one", runs(1, 3), 20)], "20250101T000001Z", FEW)
    add(tmp_path, [("one", runs(1, 3), 30)], "20250101T000002Z")
    before = fx.parts(tmp_path)
    (done,) = compact(Root(tmp_path), grace=0)
    assert (done.merged, fx.parts(tmp_path)) == (0, before)
    add(tmp_path, [("more", runs(1, 3), 40)], "20250101T000003Z")
    compact(Root(tmp_path), grace=0)
    assert len(fx.parts(tmp_path)) == 3
    assert fx.read(tmp_path, {"one": runs(1, 3)}) == {"rank": [20, 21]}


def test_what_shares_its_second_with_other_statistics_is_left(tmp_path):
    """The hash of the new part would decide on which side of them it comes."""
    for n in range(2):
        add(tmp_path, [("one", runs(1, 3), 10 * n + 1)], "20250101T000001Z")
    add(tmp_path, [("one", runs(1, 3), 30)], "20250101T000001Z", FEW)
    before = fx.parts(tmp_path)
    compact(Root(tmp_path), grace=0)
    assert fx.parts(tmp_path) == before


def test_half_precision_stays_what_it_is(tmp_path):
    for n in range(3):
        add(tmp_path, [("one", runs(1, 4), n + 1)], f"20250101T00000{n}Z", half=True)
    add(tmp_path, [("one", runs(1, 3), 90)], "20250101T000001Z")
    compact(Root(tmp_path), grace=0)
    assert len(fx.parts(tmp_path)) == 2
    assert sorted(str(pq.read_schema(p).field("logprob").type) for p in fx.parts(tmp_path)) == [
        "list<element: float>",
        "list<element: halffloat>",
    ]
    assert fx.read(tmp_path, {"one": runs(1, 3)}) == {"rank": [90, 91]}
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


def test_a_part_in_another_mixture_of_precisions_is_left_alone(tmp_path):
    for n in range(2):
        half = pa.array([[-1.0, -2.0, -3.0 - n]], pa.list_(pa.float16()))
        fx.forge(tmp_path, fx.table(logprob=half))
    before = fx.parts(tmp_path)
    Root(tmp_path).begin(IDENTITY.id, IDENTITY.json())
    (done,) = compact(Root(tmp_path), grace=0)
    assert (done.parts, done.merged, fx.parts(tmp_path)) == (2, 0, before)


def test_provenance_is_a_list_of_what_was_distinct(tmp_path):
    for n, fact in enumerate([{"model": "m"}, {"model": "n"}, {"model": "m"}]):
        add(tmp_path, [(f"{n}", runs(1, 3), 1)], f"20250101T00000{n}Z", facts=fact)
    compact(Root(tmp_path), grace=0)

    def facts():
        (new,) = fx.parts(tmp_path)
        return json.loads(pq.read_schema(new).metadata[b"prift"])

    assert facts() == [{"model": "m"}, {"model": "n"}]
    add(tmp_path, [("more", runs(1, 3), 1)], "20250101T000009Z", facts={"model": "k"})
    compact(Root(tmp_path), grace=0)
    assert facts() == [{"model": "m"}, {"model": "n"}, {"model": "k"}]


@pytest.mark.parametrize("where", ["prift", "PAR1"])
def test_a_damaged_part_is_named_and_nothing_is_deleted(tmp_path, where):
    old = small(tmp_path)
    data = bytearray(old[2].read_bytes())
    data[data.rindex(where.encode())] ^= 1
    old[2].write_bytes(data)
    with pytest.raises(CacheError, match=f"{old[2].name} is damaged"):
        compact(Root(tmp_path), grace=0)
    assert fx.parts(tmp_path) == old
    assert len(fx.files(tmp_path)) == 6


def test_a_full_disk_deletes_nothing(tmp_path):
    old = small(tmp_path)
    code = """
import resource
from prift.errors import CacheError
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
try:
    compact(Root(Path(sys.argv[1])), grace=0)
except CacheError as error:
    print(error)
"""
    out = run(code, tmp_path)
    assert "File too large. Nothing was deleted" in out.stdout, out.stderr
    assert fx.parts(tmp_path) == old
    assert len(fx.files(tmp_path)) == 6


def run(code, *arguments):
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


KILLED = {
    "as the first new part is visible": """
from prift.store import compact as module
merged = module.merged
def killed(*arguments):
    merged(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
module.merged = killed
""",
    "before it is": """
Root.publish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
""",
    "in the wait": """
import time
time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGKILL)
from prift.store import compact as module
compact = lambda *a, **k: module.compact(*a, **{**k, "grace": 1.0, "wait": time.sleep})
""",
    "in the middle of deleting": """
remove, gone = Root.remove, []
def killed(self, prior, name):
    remove(self, prior, name)
    gone.append(name)
    if len(gone) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Root.remove = killed
""",
}


@pytest.mark.parametrize("when", KILLED)
def test_killed_at_any_moment_nothing_is_lost_and_the_next_finishes(tmp_path, when):
    small(tmp_path, 9)
    code = KILLED[when] + "compact(Root(Path(sys.argv[1])), grace=0, target=9)"
    assert run(code, tmp_path).returncode == -signal.SIGKILL
    small_is_whole(tmp_path, 9)
    compact(Root(tmp_path), grace=0, target=9)
    small_is_whole(tmp_path, 9)
    assert len(PriorCache(tmp_path, IDENTITY)) == 9
    assert len(fx.parts(tmp_path)) == 3


def test_two_at_once_do_each_other_no_harm(tmp_path):
    """The second comes when the first has published and waits, with another part to merge."""
    small(tmp_path)

    def second(seconds):
        add(tmp_path, [("late", runs(1, 4), 77)], "20250101T000008Z")
        compact(Root(tmp_path), grace=0)

    (first,) = compact(Root(tmp_path), grace=1.0, wait=second)
    small_is_whole(tmp_path)
    assert fx.read(tmp_path, {"late": runs(1, 4)}) == {"rank": [77, 78, 79]}
    assert len(fx.parts(tmp_path)) == 1


def test_what_another_has_merged_and_deleted_first_is_left_to_it(tmp_path, monkeypatch):
    small(tmp_path)
    first = compact_module.merged

    def later(*arguments):
        monkeypatch.setattr(compact_module, "merged", first)
        compact(Root(tmp_path), grace=0)
        return first(*arguments)

    monkeypatch.setattr(compact_module, "merged", later)
    (done,) = compact(Root(tmp_path), grace=0)
    assert (done.merged, done.made) == (0, 0)
    assert len(fx.parts(tmp_path)) == 1
    small_is_whole(tmp_path)


def test_what_another_has_merged_while_this_one_looks_is_listed_again(tmp_path, monkeypatch):
    for n in range(3):
        add(tmp_path, [(f"row {n}", runs(1, 4), 10 * n + 1)], f"20250101T00000{n}Z", half=True)
    first = compact_module.plan

    def later(*arguments):
        monkeypatch.setattr(compact_module, "plan", first)
        compact(Root(tmp_path), grace=0)
        return first(*arguments)

    monkeypatch.setattr(compact_module, "plan", later)
    (done,) = compact(Root(tmp_path), grace=0)
    assert (done.parts, done.merged, done.made) == (1, 0, 0)
    small_is_whole(tmp_path, 3)


def test_what_another_has_deleted_behind_the_check_of_its_hash_is_left_to_it(tmp_path, monkeypatch):
    small(tmp_path)
    first = merging_module.parts.check_hash
    checked = []

    def later(path):
        first(path)
        checked.append(path)
        if len(checked) == 5:
            monkeypatch.setattr(merging_module.parts, "check_hash", first)
            compact(Root(tmp_path), grace=0)

    monkeypatch.setattr(merging_module.parts, "check_hash", later)
    (done,) = compact(Root(tmp_path), grace=0)
    assert (done.merged, done.made, len(fx.parts(tmp_path))) == (0, 0, 1)
    small_is_whole(tmp_path)


def test_provenance_too_deep_to_be_read_stays_a_text(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    for n, text in enumerate([deep, '{"model": "m"}']):
        with CacheWriter(tmp_path, IDENTITY, {"prift": text}) as writer:
            before = set(fx.parts(tmp_path))
            writer.add(key(f"row {n}"), 12, runs(1, 4), fx.stats([10 * n + k for k in (1, 2, 3)]))
        (path,) = set(fx.parts(tmp_path)) - before
        fx.renamed(path, f"20250101T00000{n}Z")
    compact(Root(tmp_path), grace=0)
    (new,) = fx.parts(tmp_path)
    assert json.loads(pq.read_schema(new).metadata[b"prift"]) == [deep, {"model": "m"}]
    small_is_whole(tmp_path, 2)


def test_two_processes_and_a_writer_lose_nothing(tmp_path):
    small(tmp_path)
    code = "compact(Root(Path(sys.argv[1])), grace=0.2, target=6)"
    command = [sys.executable, "-c", CHILD + code, str(tmp_path)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    n = 0
    while n < 20 or any(process.poll() is None for process in both):
        if n < 200:
            with CacheWriter(tmp_path, IDENTITY, {}) as writer:
                writer.add(key(f"new {n}"), 4, runs(1, 4), fx.stats([n + 1, n + 2, n + 3]))
            n += 1
        small_is_whole(tmp_path)
    assert [(p.wait(), p.stderr.read()) for p in both] == [(0, "")] * 2
    compact(Root(tmp_path), grace=0)
    compact(Root(tmp_path), grace=0)
    small_is_whole(tmp_path)
    found = fx.read(tmp_path, {f"new {i}": runs(1, 4) for i in range(n)})
    assert found["rank"] == [i + k for i in range(n) for k in (1, 2, 3)]
    assert len(PriorCache(tmp_path, IDENTITY)) == n + 5


def test_a_part_that_came_in_between_keeps_the_old_ones(tmp_path):
    """From a machine whose clock is behind: it stands before rows that readers would now take."""
    small(tmp_path)

    def late(seconds):
        add(tmp_path, [("row 4", runs(1, 3), 77)], "20250101T000002Z", FEW)

    before = PriorCache(tmp_path, IDENTITY)
    (done,) = compact(Root(tmp_path), grace=1.0, wait=late)
    assert done.left == 5
    assert fx.read(tmp_path, {"row 4": runs(1, 3)}) == {"rank": [77, 78]}
    assert len(before) == 5
    compact(Root(tmp_path), grace=0)
    assert fx.read(tmp_path, {"row 4": runs(1, 3)}) == {"rank": [77, 78]}
    assert fx.read(tmp_path, {"row 4": runs(1, 4)}) == {"rank": [41, 42, 43]}


def test_an_unknown_prior_is_named(tmp_path):
    small(tmp_path)
    with pytest.raises(CacheError, match=f"no prior abc.*\n  {IDENTITY.id}"):
        compact(Root(tmp_path), ["abc"])


def in_store(tmp_path, s3):
    small(tmp_path, 5)
    for path in fx.parts(tmp_path):
        s3.put(f"cache/{IDENTITY.id}/parts/{path.name}", path.read_bytes())
    s3.put(f"cache/{IDENTITY.id}/prior.json", IDENTITY.json().encode())


def test_a_damaged_copy_is_not_the_store_s_fault(tmp_path, s3):
    in_store(tmp_path, s3)
    PriorCache(s3.url(), IDENTITY)
    (copy, *_) = (tmp_path / "copies").rglob("20250101T000002Z*.parquet")
    data = bytearray(copy.read_bytes())
    data[data.rindex(b"prift")] ^= 1
    copy.write_bytes(data)
    with pytest.raises(CacheError, match="the copy of s3:.*was damaged, and is removed"):
        compact(open_root(s3.url()), grace=0)
    assert len(s3.objects()) == 6
    (done,) = compact(open_root(s3.url()), grace=0)
    assert (done.merged, done.made) == (5, 1)
    assert len(s3.objects()) == 2


def test_a_store_that_lets_nobody_delete_loses_nothing(tmp_path, s3):
    in_store(tmp_path, s3)
    fault = s3.server.fail(403, "DELETE", times=float("inf"))
    with pytest.raises(CacheError, match="s3://"):
        compact(open_root(s3.url()), grace=0)
    assert fault.seen
    assert len(s3.objects()) == 7
    s3.server.faults.clear()
    (done,) = compact(open_root(s3.url()), grace=0)
    assert (done.merged, done.made, len(s3.objects())) == (5, 1, 2)


def test_in_an_object_store(tmp_path, s3):
    in_store(tmp_path, s3)
    reader = PriorCache(s3.url(), IDENTITY)
    compact(open_root(s3.url()), grace=0)
    (name,) = [n for n in s3.objects() if n.endswith(".parquet")]
    assert name.startswith(f"cache/{IDENTITY.id}/parts/20250101T000004Z-")
    for cache in (reader, PriorCache(s3.url(), IDENTITY)):
        found = cache.read(keys("row 3"), [runs(1, 4)], ("rank",))["rank"]
        assert found.tolist() == [31, 32, 33]


RUNS = st.lists(st.booleans(), max_size=4).map(
    lambda tail: spans.spans_of(np.array([False, True, *tail]))
)
PART = st.fixed_dictionaries(
    {
        "rows": st.lists(st.tuples(st.integers(0, 1), RUNS), min_size=1, max_size=3),
        "second": st.integers(0, 4),
        "names": st.sampled_from([CORE, FEW]),
        "half": st.sampled_from([False, False, True]),
    }
)
EVERY = [
    (str(name), runs(begin, end))
    for name in range(2)
    for begin in range(1, 6)
    for end in range(begin + 1, 7)
] + [(str(name), runs(1, 2, 3, 4)) for name in range(2)]


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(PART, min_size=3, max_size=7),
    target=st.integers(1, 30),
    group=st.integers(1, 9),
)
def test_every_request_is_answered_with_the_same_bits(tmp_path_factory, parts, target, group):
    """Before; with old and new parts side by side; after; and after a further compaction of all.
    Asked are all runs of positions, of both sequences, for either set of statistics."""
    root = tmp_path_factory.mktemp("cache")
    rank = 1
    for part in parts:
        rows = []
        for name, runs_ in part["rows"]:
            rows.append((str(name), runs_, rank))
            rank += spans.count(runs_)
        add(root, rows, f"20250101T00000{part['second']}Z", part["names"], part["half"])

    def answers():
        cache, found = PriorCache(root, IDENTITY), []
        for names in (CORE, FEW):
            asked, wanted = keys(*(name for name, _ in EVERY)), [runs_ for _, runs_ in EVERY]
            absent = cache.missing(asked, wanted, names)
            there = [i for i in range(len(EVERY)) if i not in absent]
            read = cache.read(asked[there], [wanted[i] for i in there], names)
            found.append((absent, {n: v.tobytes() for n, v in read.items()}))
        return found

    before, between = answers(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prift.store.writer._ROW_GROUP_TOKENS", group)
        compact(Root(root), grace=1.0, target=target, wait=lambda _: between.append(answers()))
        assert all(one == before for one in between)
        assert answers() == before
        compact(Root(root), grace=0)
        assert answers() == before
    assert os.listdir(root / IDENTITY.id / "parts")
