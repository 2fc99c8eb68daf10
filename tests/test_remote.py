"""A cache in an object store: a real S3 protocol server, and fsspec's store in memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prift.cache import PriorCache, list_priors
from prift.errors import CacheError, MissingPrior, OptionError
from prift.store import stores
from prift.store.remote import open_root
from prift.store.roots import Root
from prift.store.stores import Store
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, key, keys, runs

ONE = ("one", 4, runs(1, 4), [1, 2, 3])
TWO = ("two", 4, runs(1, 4), [4, 5, 6])
WANTED = {"one": runs(1, 4)}


@pytest.fixture
def quick(monkeypatch):
    """As many tries as ever, sooner one after the other."""
    monkeypatch.setattr(stores, "_PAUSES", (0.01,) * len(stores._PAUSES))


def add(url, *rows):
    with CacheWriter(url, IDENTITY, {}) as writer:
        for name, length, spans, ranks in rows:
            writer.add(key(name), length, spans, fx.stats(ranks))


def copies(url):
    return sorted(open_root(url).parts_folder(IDENTITY.id).iterdir())


def another_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))


def only_part(bucket):
    (name,) = [n for n in bucket.objects() if n.endswith(".parquet")]
    return name


@pytest.fixture(params=["s3", "memory"])
def url(request, tmp_path, monkeypatch):
    """A place in a store. memory:// is fsspec's, as hf:// is, and all in this process."""
    if request.param == "s3":
        return request.getfixturevalue("s3").url()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    return f"memory://{tmp_path.name}/cache"


def test_a_cache_at_a_url_is_a_cache(url, tmp_path, monkeypatch):
    assert list_priors(url) == {}
    assert fx.missing(url, WANTED) == [0]
    add(url, ONE)
    add(url, TWO)
    for _ in range(2):
        assert list_priors(url) == {IDENTITY.id: IDENTITY}
        assert fx.missing(url, {**WANTED, "six": runs(1, 2)}) == [1]
        assert fx.read(url, {"two": runs(2, 4), "one": runs(1, 2)}) == {"rank": [5, 6, 1]}
        another_machine(monkeypatch, tmp_path)
    root = open_root(url)
    parts = root.parts(IDENTITY.id)
    assert all(abs(part.written - time.time()) < 3600 for part in parts)
    root.remove(IDENTITY.id, parts[0].name)
    root.remove(IDENTITY.id, parts[0].name)
    assert root.parts(IDENTITY.id) == parts[1:]
    root.remove_prior(IDENTITY.id)
    assert (root.priors(), root.parts(IDENTITY.id)) == ([], [])


def test_an_open_reader_sees_what_comes_and_goes(url):
    add(url, ONE)
    cache = PriorCache(url, IDENTITY)
    (old,) = cache.parts
    add(url, ONE, TWO)
    assert len(cache) == 1
    cache.refresh()
    assert len(cache) == 3
    first = min(cache.parts)  # whose row is the one that is read
    open_root(url).remove(IDENTITY.id, first)  # as compaction does, and takes the copy away too
    found = cache.read(keys("one"), [runs(1, 4)], ("rank",))["rank"]
    assert found.tolist() == [1, 2, 3]
    assert len(cache) == 3 - (1 if first == old else 2)


def test_a_part_is_downloaded_once_and_an_identity_too(s3, monkeypatch, tmp_path):
    add(s3.url(), ONE)
    another_machine(monkeypatch, tmp_path)
    for gets in (2, 0):
        s3.server.requests.clear()
        assert list_priors(s3.url()) == {IDENTITY.id: IDENTITY}
        assert fx.read(s3.url(), WANTED) == {"rank": [1, 2, 3]}
        paths = [p for method, p in s3.server.requests if method == "GET" and p.count("/") > 2]
        assert len(paths) == gets


def test_copies_are_for_their_user_alone(url, tmp_path, monkeypatch):
    def modes():
        home = Path(os.environ["XDG_CACHE_HOME"]) / "prift" / "copies"
        return [path.stat().st_mode & 0o777 for path in home.iterdir()]

    add(url, ONE)
    assert modes() == [0o700]
    for number, use in enumerate((list_priors, lambda url: fx.read(url, WANTED))):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"elsewhere {number}"))
        use(url)
        assert modes() == [0o700]


def test_a_damaged_copy_is_downloaded_anew(s3):
    add(s3.url(), ONE)
    (copy,) = copies(s3.url())
    whole, unseen = copy.read_bytes(), 0
    right = {name: values.tolist() for name, values in fx.stats([1, 2, 3]).items()}
    for at in range(0, len(whole), 101):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        copy.write_bytes(flipped)
        try:
            assert fx.read(s3.url(), WANTED, CORE) == right
            assert copy.read_bytes() == whole
        except MissingPrior:  # a column of another name: no row is read, so none is a wrong one
            unseen += 1
    assert unseen < 3


def test_copies_may_go_at_any_time(s3):
    add(s3.url(), ONE)
    cache = PriorCache(s3.url(), IDENTITY)
    for _ in range(2):
        copies(s3.url())[0].unlink()
        assert cache.read(keys("one"), [runs(1, 4)], ("rank",))["rank"].tolist() == [1, 2, 3]


def test_old_copies_of_parts_that_are_gone_go_too(s3):
    add(s3.url(), ONE)
    add(s3.url(), TWO)
    old, young = copies(s3.url())
    for name in [n for n in s3.objects() if n.endswith(".parquet")]:
        s3.delete(name)
    os.utime(old, (1, 1))
    assert len(PriorCache(s3.url(), IDENTITY)) == 0
    assert copies(s3.url()) == [young]


@pytest.mark.parametrize("at", [0, 700, -1])
def test_a_flipped_bit_in_the_store_is_found(s3, tmp_path, monkeypatch, at):
    add(s3.url(), ONE)
    name = only_part(s3)
    data = bytearray(s3.get(name))
    data[at] ^= 16
    s3.put(name, bytes(data))
    another_machine(monkeypatch, tmp_path)
    with pytest.raises(CacheError, match=f"s3://{s3.name}/{name} is damaged.*hash"):
        fx.missing(s3.url(), WANTED)
    assert copies(s3.url()) == []


@pytest.mark.parametrize("how", [500, 503, "cut", "lost"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_errors_that_pass_are_no_errors(s3, quick, monkeypatch, tmp_path, how, method):
    fault = s3.server.fail(how, method, times=2)
    add(s3.url(), ONE)
    if method == "GET":
        another_machine(monkeypatch, tmp_path)
    assert fx.read(s3.url(), WANTED) == {"rank": [1, 2, 3]}
    assert fault.seen == 2
    assert len(s3.objects()) == 2


@pytest.mark.parametrize("how", [503, "cut", "lost"])
def test_a_store_that_takes_nothing_is_an_error_and_nothing_is_there(s3, quick, how):
    add(s3.url(), ONE)
    before = s3.objects()
    fault = s3.server.fail(how, "PUT", "/parts/", times=float("inf"))
    with pytest.raises(CacheError, match=rf"s3://{s3.name}/cache does not answer \(6 tries\)"):
        add(s3.url(), TWO)
    assert fault.seen == 6
    assert how == "lost" or s3.objects() == before
    assert len(copies(s3.url())) == 1
    s3.server.faults.clear()
    for name in s3.objects():
        assert len(s3.get(name)) == s3.objects()[name] > 0
    add(s3.url(), TWO)
    assert fx.read(s3.url(), {"two": runs(1, 4), "one": runs(1, 4)}) == {"rank": [4, 5, 6, 1, 2, 3]}


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_large_objects_are_whole_or_absent_too(s3, quick, method):
    """Those of more than ten million bytes go up in pieces (PUT) that are put together (POST)."""
    data = np.random.default_rng(0).bytes(12_000_000)
    store = Store(s3.url())
    store.put("large", data)
    assert s3.get("cache/large") == data
    fault = s3.server.fail(503, method, times=float("inf"))
    with pytest.raises(CacheError, match="does not answer"):
        store.put("second", data)
    assert fault.seen >= 6
    assert list(s3.objects()) == ["cache/large"]


@pytest.mark.parametrize(("status", "words"), [(403, "ACCESS_DENIED"), (404, "NOT_FOUND")])
def test_what_another_try_cannot_change_is_tried_once(s3, status, words):
    fault = s3.server.fail(status, "PUT", times=float("inf"))
    with pytest.raises(CacheError, match=f"s3://{s3.name}/cache: .*{words}"):
        add(s3.url(), ONE)
    assert fault.seen == 1


def test_a_bucket_that_is_not_there(s3):
    with pytest.raises(CacheError, match="NO_SUCH_BUCKET"):
        add(s3.url().replace(s3.name, "no-such-bucket"), ONE)


def test_silence_is_waited_out_once(s3, quick):
    """The time-out is AWS's: three seconds without a byte."""
    add(s3.url(), ONE)
    fault = s3.server.fail("hang", "GET")
    assert fx.read(s3.url(), WANTED) == {"rank": [1, 2, 3]}
    assert fault.seen == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_lasting_silence_ends_in_an_error(s3, method):
    add(s3.url(), ONE)
    fault = s3.server.fail("hang", method, times=float("inf"))
    with pytest.raises(CacheError, match=r"does not answer \(6 tries\)"):
        add(s3.url(), TWO) if method == "PUT" else fx.read(s3.url(), WANTED)
    assert fault.seen == 6


def test_credentials_are_refused_in_a_url_and_not_repeated(s3):
    secret = "wJalr%2FXUtnFEMI-K7MDENG"
    with pytest.raises(OptionError, match="leave credentials out") as error:
        open_root(s3.url(user=f"AKIAEXAMPLEKEY:{secret}@"))
    assert "AKIAEXAMPLEKEY" not in str(error.value) and "wJalr" not in str(error.value)


CHILD = """
import resource, sys
from prift.errors import CacheError
from tests import cache_fixtures as fx
from tests.cache_fixtures import *

limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if sys.argv[3] == "up":
        with CacheWriter(sys.argv[1], IDENTITY, {}) as writer:
            writer.add(key("two"), 4, runs(1, 4), stats([4, 5, 6]))
    else:
        PriorCache(sys.argv[1], IDENTITY)
except CacheError as error:
    print(error)
"""


@pytest.mark.parametrize(("way", "limit"), [("up", 2), ("up", 1500), ("down", 1000)])
def test_a_disk_too_full_for_copies(s3, tmp_path, way, limit):
    add(s3.url(), ONE)
    before = s3.objects()
    place = Path(__file__).parent.parent
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "full"), "PYTHONPATH": str(place)}
    command = [sys.executable, "-c", CHILD, s3.url(), str(limit), way]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "File too large" in done.stdout and str(tmp_path / "full") in done.stdout
    assert f"s3://{s3.name}/cache/{IDENTITY.id}" in done.stdout
    assert [f for f in (tmp_path / "full").rglob("*") if f.is_file()] == []
    assert s3.objects() == before


@pytest.mark.parametrize("url", ["file:///{}", "file://localhost/{}"])
def test_file_urls_are_folders(tmp_path, url):
    place = tmp_path / "a b"
    assert type(root := open_root(url.format(str(place)[1:].replace(" ", "%20")))) is Root
    assert root.folder == place


@pytest.mark.parametrize("url", ["file://cache", "file://", "s3://", "nosuch://x/y", "://"])
def test_urls_that_name_no_store_are_refused(url):
    with pytest.raises(CacheError):
        list_priors(url)
