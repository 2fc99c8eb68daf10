"""Copying between roots: only what is missing, each part verified, nothing half-written seen."""

import os
import signal
import subprocess
import sys

import pytest

from prift.cache import PriorCache
from prift.errors import CacheError
from prift.store.compact import compact
from prift.store.copying import copy
from prift.store.remote import open_root
from prift.store.roots import Root
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import IDENTITY, OTHER, key, keys, runs

KILLED = """
import os, signal, sys
from pathlib import Path
from prift.store.copying import copy
from prift.store.roots import Root
publish, copied = Root.publish, []
def killed(self, prior, file, name):
    if len(copied) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
    copied.append(publish(self, prior, file, name))
Root.publish = killed
copy(Root(Path(sys.argv[1])), Root(Path(sys.argv[2])))
"""


@pytest.fixture
def source(tmp_path):
    """A cache of seven parts, a row each."""
    for n in range(7):
        fx.add(tmp_path / "source", [(f"row {n}", 4, runs(1, 4), [n + 1, n + 2, n + 3])])
    return tmp_path / "source"


def whole(place) -> None:
    wanted = [runs(1, 4)] * 7
    found = PriorCache(place, IDENTITY).read(
        keys(*(f"row {n}" for n in range(7))), wanted, ["rank"]
    )
    assert found["rank"].tolist() == [n + i for n in range(7) for i in (1, 2, 3)]


def test_all_is_copied_and_then_nothing(source, tmp_path):
    target = tmp_path / "target"
    (done,) = copy(Root(source), Root(target))
    size = sum(path.stat().st_size for path in fx.parts(source))
    assert (done.parts, done.there, done.copied, done.copied_bytes) == (7, 0, 7, size)
    assert fx.files(target) == fx.files(source)
    assert (target / IDENTITY.id / "prior.json").read_text() == IDENTITY.json()
    whole(target)
    before = [path.stat().st_ino for path in fx.parts(target)]
    fx.add(source, [("more", 4, runs(1, 4), [1, 2, 3])])
    (done,) = copy(Root(source), Root(target))
    assert (done.parts, done.there, done.copied) == (8, 7, 1)
    assert {*before} < {path.stat().st_ino for path in fx.parts(target)}
    (done,) = copy(Root(source), Root(target))
    assert (done.there, done.copied, done.copied_bytes) == (8, 0, 0)


def test_only_the_named_prior(source, tmp_path):
    with CacheWriter(source, OTHER, {}) as writer:
        writer.add(key("one"), 4, runs(1, 4), fx.stats([7, 8, 9]))
    copy(Root(source), Root(tmp_path / "target"), [OTHER.id[:6]])
    assert os.listdir(tmp_path / "target") == [OTHER.id]
    with pytest.raises(CacheError, match=f"no prior abc.*\n.*\n.*{OTHER.id}"):
        copy(Root(source), Root(tmp_path / "target"), ["abc"])


def test_a_damaged_part_is_named_and_the_others_are_copied(source, tmp_path):
    bad = fx.parts(source)[3]
    data = bytearray(bad.read_bytes())
    data[100] ^= 1
    bad.write_bytes(data)
    (done,) = copy(Root(source), Root(tmp_path / "target"))
    assert done.copied == 6
    (said,) = done.damaged
    assert str(bad) in said and "damaged" in said
    assert fx.files(tmp_path / "target") == [n for n in fx.files(source) if n != bad.name]


def test_what_was_cut_short_in_the_target_is_copied_again(source, tmp_path):
    target = tmp_path / "target"
    copy(Root(source), Root(target))
    os.truncate(fx.parts(target)[2], 100)
    (done,) = copy(Root(source), Root(target))
    assert (done.there, done.copied) == (6, 1)
    whole(target)


def test_killed_on_the_way_only_whole_parts_are_seen_and_the_next_goes_on(source, tmp_path):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "target")]
    killed = subprocess.run(command, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = fx.parts(tmp_path / "target")
    assert len(there) >= 3  # others may have been copied meanwhile
    assert all(
        path.read_bytes() == (fx.parts(source)[0].parent / path.name).read_bytes() for path in there
    )
    (done,) = copy(Root(source), Root(tmp_path / "target"))
    assert (done.there, done.copied) == (len(there), 7 - len(there))
    whole(tmp_path / "target")


def test_a_full_disk_shows_nothing_half_written(source, tmp_path):
    code = """
import resource, sys
from pathlib import Path
from prift.store.copying import copy
from prift.errors import CacheError
from prift.store.roots import Root
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    copy(Root(Path(sys.argv[1])), Root(Path(sys.argv[2])))
except CacheError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "File too large. What was copied is kept" in done.stdout, done.stderr
    assert fx.files(tmp_path / "target") == ["prior.json"]


def test_a_source_that_is_compacted_meanwhile_is_copied_whole(source, tmp_path, monkeypatch):
    fetch = Root.download

    def compacted_first(self, prior, part, folder):
        if len(fx.parts(source)) == 7:
            monkeypatch.setattr(Root, "download", fetch)
            compact(Root(source), grace=0)
        return fetch(self, prior, part, folder)

    monkeypatch.setattr("prift.store.copying._AT_ONCE", 1)
    monkeypatch.setattr(Root, "download", compacted_first)
    (done,) = copy(Root(source), Root(tmp_path / "target"))
    assert (done.parts, done.copied, done.damaged) == (1, 1, [])
    whole(tmp_path / "target")


def test_another_priors_json_in_the_target_is_refused(source, tmp_path):
    place = tmp_path / "target" / IDENTITY.id
    place.mkdir(parents=True)
    (place / "prior.json").write_text(OTHER.json())
    with pytest.raises(CacheError, match="prior.json does not belong there"):
        copy(Root(source), Root(tmp_path / "target"))


def test_to_a_store_and_back(source, tmp_path, s3):
    (done,) = copy(Root(source), open_root(s3.url()))
    assert done.copied == 7
    names = {f"cache/{IDENTITY.id}/parts/{path.name}" for path in fx.parts(source)}
    assert set(s3.objects()) == names | {f"cache/{IDENTITY.id}/prior.json"}
    assert not list((tmp_path / "copies").rglob("*.parquet"))  # this disk keeps none
    bad = f"cache/{IDENTITY.id}/parts/{fx.parts(source)[4].name}"
    s3.put(bad, s3.get(bad)[:-1] + b"!")
    (done,) = copy(open_root(s3.url()), Root(tmp_path / "target"))
    assert done.copied == 6
    assert "damaged" in done.damaged[0]
    copy(Root(source), Root(tmp_path / "target"))
    whole(tmp_path / "target")
    assert not list((tmp_path / "copies").rglob("*.parquet"))


def test_a_store_that_fails_now_and_then(source, tmp_path, s3):
    s3.server.fail(503, "PUT", ".parquet", times=1)
    s3.server.fail("cut", "PUT", ".parquet", times=1)
    (done,) = copy(Root(source), open_root(s3.url()))
    assert done.copied == 7
    s3.server.fail("cut", "GET", ".parquet", times=1)
    (done,) = copy(open_root(s3.url()), Root(tmp_path / "target"))
    assert (done.copied, done.damaged) == (7, [])
    whole(tmp_path / "target")
