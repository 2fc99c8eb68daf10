"""Stores that fsspec opens: which of them, and what becomes of their clients' own errors."""

from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from prift.errors import CacheError
from prift.store import stores
from prift.store.remote import open_root
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import IDENTITY, key, runs

WANTED = {"one": runs(1, 4)}


def add(url):
    with CacheWriter(url, IDENTITY, {}) as writer:
        writer.add(key("one"), 4, runs(1, 4), fx.stats([1, 2, 3]))


class Unhappy(MemoryFileSystem):
    """Raises what is no OSError, as httpx does under hf://, the next `times` times."""

    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    protocol, cachable = "memory", False
    times, method = 0.0, ""

    @classmethod
    def strike(cls, method):
        if cls.times > 0 and method == cls.method:
            cls.times -= 1
            raise RuntimeError("peer closed connection\nsecond line")


for _name in ("info", "_open", "find", "rm"):

    def _struck(self, *args, _name=_name, **options):
        self.strike(_name)
        return getattr(MemoryFileSystem, _name)(self, *args, **options)

    setattr(Unhappy, _name, _struck)


@pytest.fixture
def unhappy(monkeypatch, tmp_path):
    """A place in such a store."""
    monkeypatch.setattr(stores, "_PAUSES", (0.01,) * len(stores._PAUSES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    monkeypatch.setattr(Unhappy, "times", 0)
    Unhappy.store.clear()
    fsspec.register_implementation("memory", Unhappy, clobber=True)
    yield f"memory://{tmp_path.name}/unhappy"
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


@pytest.mark.parametrize("method", ["info", "_open", "find"])
def test_errors_of_a_stores_client_are_the_stores(unhappy, monkeypatch, tmp_path, method):
    add(unhappy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))  # another machine
    monkeypatch.setattr(Unhappy, "method", method)
    monkeypatch.setattr(Unhappy, "times", 3)
    assert fx.read(unhappy, WANTED) == {"rank": [1, 2, 3]}
    assert Unhappy.times == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    monkeypatch.setattr(Unhappy, "times", float("inf"))
    with pytest.raises(CacheError, match="does not answer.*RuntimeError: peer closed connection"):
        fx.read(unhappy, WANTED)


def test_what_is_read_a_little_at_a_time_fails_as_an_os_error_too(unhappy, monkeypatch):
    add(unhappy)
    root = open_root(unhappy)
    source = root.source(IDENTITY.id, root.parts(IDENTITY.id)[0])

    def fail(*_):
        raise RuntimeError("peer closed connection")

    (file,) = (f for path, f in Unhappy.store.items() if path.endswith(".parquet"))
    monkeypatch.setattr(file, "read", fail, raising=False)
    with pytest.raises(OSError, match="peer closed"):
        source.read(4)


@pytest.mark.parametrize("scheme", ["sftp", "ssh", "smb", "ftp", "webdav", "http", "https"])
def test_stores_that_write_in_place_are_refused_by_name(scheme):
    with pytest.raises(CacheError, match=rf"{scheme}:// is no store.*s3://, gs://, hf://"):
        open_root(f"{scheme}://host.invalid/cache")
