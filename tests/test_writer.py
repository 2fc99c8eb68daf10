"""Writing: parts that are whole or absent, whatever the disk, the user or the system does."""

import hashlib
import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from prift.cache import PriorCache, list_priors
from prift.errors import CacheError
from prift.store.newfile import NewFile
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, files, key, keys, runs


def test_prior_json_is_canonical_and_its_hash_names_the_folder(tmp_path):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    (folder,) = tmp_path.iterdir()
    data = (folder / "prior.json").read_bytes()
    assert folder.name == hashlib.sha256(data).hexdigest()[:16] == "5c958f5a57af1fb9"
    again = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert data == again.encode()
    assert list_priors(tmp_path) == {"5c958f5a57af1fb9": IDENTITY}


def test_prior_json_is_not_written_again(tmp_path):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    file = tmp_path / IDENTITY.id / "prior.json"
    before = file.stat()
    fx.add(tmp_path, [("two", 4, runs(1, 4), [1, 2, 3])])
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_priors_live_beside_each_other(tmp_path):
    other = replace(IDENTITY, dtype="bfloat16")
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    with CacheWriter(tmp_path, other, {}) as writer:
        writer.add(key("one"), 4, runs(1, 4), fx.stats([7, 8, 9]))
    assert list_priors(tmp_path) == {IDENTITY.id: IDENTITY, other.id: other}
    found = PriorCache(tmp_path, other).read(keys("one"), [runs(1, 4)], ("rank",))
    assert found["rank"].tolist() == [7, 8, 9]
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"weights": 1}', "\xff", "{" * 9])
def test_a_prior_json_that_is_none_is_named(tmp_path, text):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    (tmp_path / IDENTITY.id / "prior.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match="prior.json"):
        list_priors(tmp_path)


def test_a_prior_json_in_the_wrong_folder_is_named(tmp_path):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    (tmp_path / IDENTITY.id).rename(tmp_path / "0123456789abcdef")
    with pytest.raises(CacheError, match=f"does not belong there.*{IDENTITY.id}"):
        list_priors(tmp_path)


def test_provenance_is_in_each_part_and_not_in_prior_json(tmp_path):
    with CacheWriter(tmp_path, IDENTITY, {"prift": '{"model": "m"}'}) as writer:
        writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))
    (part,) = fx.parts(tmp_path)
    assert pq.ParquetFile(part).metadata.metadata[b"prift"] == b'{"model": "m"}'
    assert b"model" not in (tmp_path / IDENTITY.id / "prior.json").read_bytes()


def test_nothing_is_visible_before_a_part_is_finished_and_nothing_hidden_remains(tmp_path):
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        assert fx.parts(tmp_path) == []
        writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))
        assert fx.parts(tmp_path) == []
        writer.flush()
        assert len(fx.parts(tmp_path)) == 1
        writer.add(key("two"), 4, runs(1, 4), fx.stats([1, 2, 3]))
        assert len(fx.parts(tmp_path)) == 1
    assert len(fx.parts(tmp_path)) == 2
    assert files(tmp_path) == sorted(["prior.json", *(p.name for p in fx.parts(tmp_path))])


def test_without_rows_there_is_no_part(tmp_path):
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        writer.flush()
    assert files(tmp_path) == ["prior.json"]
    assert fx.missing(tmp_path, {"one": runs(1, 4)}) == [0]


def test_a_part_ends_after_part_seconds(tmp_path):
    with CacheWriter(tmp_path, IDENTITY, {}, part_seconds=0.0) as writer:
        for name in ("one", "two"):
            writer.add(key(name), 4, runs(1, 4), fx.stats([1, 2, 3]))
            time.sleep(0.01)
        assert len(fx.parts(tmp_path)) == 2


def test_a_part_ends_after_four_million_tokens(tmp_path):
    n = 1 << 21
    with CacheWriter(tmp_path, IDENTITY, {}, part_seconds=1e9) as writer:
        for name in ("one", "two", "six"):
            writer.add(key(name), n + 1, runs(1, n + 1), fx.stats(np.ones(n), ("rank", "n_tie")))
        assert [pq.read_metadata(p).num_rows for p in fx.parts(tmp_path)] == [2]
    assert len(fx.parts(tmp_path)) == 2


def test_row_groups_hold_about_192k_tokens(tmp_path):
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        for number in range(100):
            n = 5_000
            writer.add(key(str(number)), n + 1, runs(1, n + 1), fx.stats(np.ones(n)))
    meta = pq.read_metadata(fx.parts(tmp_path)[0])
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [40, 40, 20]


def test_rows_with_other_statistics_begin_another_part(tmp_path):
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))
        writer.add(key("two"), 4, runs(1, 4), fx.stats([4, 5, 6], ("rank",)))
    columns = sorted(pq.read_schema(p).names[3:] for p in fx.parts(tmp_path))
    assert columns == [list(CORE), ["rank"]]
    assert fx.missing(tmp_path, {"one": runs(1, 4), "two": runs(1, 4)}, CORE) == [1]


@pytest.mark.parametrize(
    ("spans", "ranks"),
    [(runs(1, 4), [1, 2]), (runs(0, 3), [1, 2, 3]), (runs(1, 6), [1] * 5), (runs(2, 1), [])],
)
def test_a_row_that_contradicts_itself_is_refused_and_the_others_are_kept(tmp_path, spans, ranks):
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))
        with pytest.raises(ValueError, match="do not fit"):
            writer.add(key("bad"), 5, spans, fx.stats(ranks))
        writer.add(key("two"), 4, runs(1, 4), fx.stats([4, 5, 6]))
    assert fx.read(tmp_path, {"two": runs(1, 4), "one": runs(1, 2)}) == {"rank": [4, 5, 6, 1]}
    assert len(PriorCache(tmp_path, IDENTITY)) == 2


def test_rows_added_before_an_exception_are_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, IDENTITY, {}) as writer:
        writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))
        raise KeyboardInterrupt
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


def interrupted(monkeypatch, at: int) -> list[int]:
    """Ctrl-C arrives when half of the `at`th piece of a file is written; the pieces so far."""
    calls, write = [], NewFile.write

    def broken(file, data):
        calls.append(len(data))
        if len(calls) == at:
            write(file, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGINT)
            return write(file, data[len(data) // 2 :])
        return write(file, data)

    monkeypatch.setattr(NewFile, "write", broken)
    return calls


@pytest.mark.parametrize("at", [2, 7, 12])
def test_an_interrupt_in_the_middle_of_writing_removes_the_part(tmp_path, monkeypatch, at):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    before, calls = files(tmp_path), interrupted(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, IDENTITY, {}) as writer:
        writer.add(key("two"), 4, runs(1, 4), fx.stats([1, 2, 3]))
        writer.flush()
    assert len(calls) >= at
    assert files(tmp_path) == before
    assert fx.missing(tmp_path, {"one": runs(1, 4), "two": runs(1, 4)}) == [1]


@pytest.mark.parametrize("at", [3, 7, 12])  # 1: prior.json, 2: what a part begins with
def test_an_interrupt_on_leaving_is_raised_once_the_rows_are_kept(tmp_path, monkeypatch, at):
    calls = interrupted(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, IDENTITY, {}) as writer:
        writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))
    assert len(calls) >= at and writer.visible == 1
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("blocked", ["root", "prior", "parts"])
def test_a_place_that_cannot_be_a_folder_is_an_error_of_the_cache(tmp_path, blocked):
    places = {"root": "cache", "prior": f"cache/{IDENTITY.id}"}
    place = tmp_path / {**places, "parts": places["prior"] + "/parts"}[blocked]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    with pytest.raises(CacheError, match="cannot write to the cache .* run the same command again"):
        CacheWriter(tmp_path / "cache", IDENTITY, {})
    assert files(tmp_path) == [place.name]


def test_a_folder_that_vanishes_while_writing_is_an_error_of_the_cache(tmp_path):
    with pytest.raises(CacheError, match="No such file"):
        with CacheWriter(tmp_path, IDENTITY, {}) as writer:
            (tmp_path / IDENTITY.id / "parts").rmdir()
            writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))
