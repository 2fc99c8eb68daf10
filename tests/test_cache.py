"""Finding and reading rows: keys, which row serves, order, speed."""

import hashlib
import re
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.cache import PriorCache, list_priors, sequence_key
from prift.errors import CacheError, MissingPrior
from prift.store import spans
from prift.store.remote import open_root
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, OTHER, key, keys, runs


def test_key_is_the_hash_of_the_ids_as_little_endian_int32():
    # sha256 of 01000000 02000000 2c010000 7f510200
    expected = bytes.fromhex("9165fcdd4d2fe9efae9cd24b9284d75a")
    assert sequence_key(np.array([1, 2, 300, 151935], np.int32)) == expected
    packed = struct.pack("<4i", 1, 2, 300, 151935)
    assert hashlib.sha256(packed).digest()[:16] == expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64, ">i4", np.uint16])
def test_key_does_not_depend_on_how_the_ids_are_held(dtype):
    ids = np.array([7, 8, 9], dtype)
    expected = sequence_key(np.array([7, 8, 9], np.int32))
    assert sequence_key(ids) == sequence_key(np.repeat(ids, 2)[::2]) == expected
    assert sequence_key(ids[::-1]) != expected


def test_a_key_that_ends_in_zero_bytes_is_found(tmp_path):
    ids = np.array([7, 166595], np.int32)
    whole = sequence_key(ids)
    assert whole == bytes.fromhex("b7f2acb86c41b0cef36b6b1fbe4a0000")
    stripped = np.array([whole], "S16")
    assert len(stripped[0]) == 14  # what numpy hands out
    for number, given_key in enumerate([whole, stripped[0]]):
        root = tmp_path / str(number)
        with CacheWriter(root, IDENTITY, {}) as writer:
            writer.add(given_key, 2, runs(1, 2), fx.stats([5]))
        cache = PriorCache(root, IDENTITY)
        assert cache.missing(stripped, [runs(1, 2)], CORE) == []
        assert cache.read(stripped, [runs(1, 2)], ("rank",))["rank"].tolist() == [5]
        shorter = np.array([whole[:13] + b"\1"], "S16")
        assert cache.missing(shorter, [runs(1, 2)], CORE) == [0]


def test_keys_that_agree_in_their_first_half_are_told_apart(tmp_path):
    twins = [b"samehalf-first--", b"samehalf-second-", b"samehalf-third--"]
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        for rank, twin in enumerate(twins[:2], 1):
            writer.add(twin, 2, runs(1, 2), fx.stats([rank]))
    cache = PriorCache(tmp_path, IDENTITY)
    asked = np.array(twins[::-1], "S16")
    assert cache.missing(asked, [runs(1, 2)] * 3, ("rank",)) == [0]
    assert cache.read(asked[1:], [runs(1, 2)] * 2, ("rank",))["rank"].tolist() == [2, 1]


def test_round_trip_keeps_bits_types_and_order(tmp_path):
    fx.add(tmp_path, [("one", 9, runs(1, 3, 5, 6), [3, 1, 2]), ("two", 3, runs(2, 3), [9])])
    cache = PriorCache(tmp_path, IDENTITY)
    found = cache.read(keys("two", "one"), [runs(2, 3), runs(1, 3, 5, 6)], CORE)
    expected = fx.stats([9, 3, 1, 2])
    assert list(found) == list(CORE)
    for name in CORE:
        assert found[name].dtype == expected[name].dtype
        assert found[name].tobytes() == expected[name].tobytes()


def test_extreme_values_come_back_to_the_bit(tmp_path):
    values = np.array([0.0, -0.0, -1e-45, -3.4e38, -np.inf, -1.1754944e-38], np.float32)
    extreme = {**fx.stats(np.full(6, 2**31 - 1)), "logprob": values, "log_mass_rank": values}
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        writer.add(key("one"), 7, runs(1, 7), extreme)
    found = PriorCache(tmp_path, IDENTITY).read(keys("one"), [runs(1, 7)], CORE)
    assert all(found[name].tobytes() == extreme[name].tobytes() for name in CORE)


def test_an_absent_or_empty_cache_lacks_everything_and_makes_nothing(tmp_path):
    root = tmp_path / "none"
    cache = PriorCache(root, IDENTITY)
    assert len(cache) == 0
    assert cache.missing(keys("one", "two"), [runs(1, 2)] * 2, CORE) == [0, 1]
    with pytest.raises(MissingPrior, match="2 sequences have no row"):
        cache.read(keys("one", "two"), [runs(1, 2)] * 2, CORE)
    assert cache.read(keys(), [], ("rank",))["rank"].tolist() == []
    assert list_priors(root) == {}
    assert not root.exists()


def test_missing_is_in_the_order_asked(tmp_path):
    fx.add(tmp_path, [("b", 4, runs(1, 4), [1, 2, 3]), ("d", 4, runs(1, 3), [1, 2])])
    whole = runs(1, 4)
    wanted = {"z": whole, "b": whole, "d": whole, "a": whole}
    assert fx.missing(tmp_path, wanted) == [0, 2, 3]  # the row of d is not whole


def test_a_sequence_asked_for_twice_is_answered_twice(tmp_path):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3]), ("two", 4, runs(1, 4), [4, 5, 6])])
    cache = PriorCache(tmp_path, IDENTITY)
    asked = keys("two", "one", "two")
    found = cache.read(asked, [runs(1, 2), runs(3, 4), runs(1, 4)], ("rank",))["rank"]
    assert found.tolist() == [4, 3, 4, 5, 6]


STORED = runs(1, 4, 6, 9)  # positions 1 2 3 6 7 8


@pytest.mark.parametrize(
    ("wanted", "ranks"),
    [
        (STORED, [11, 12, 13, 16, 17, 18]),
        (runs(1, 2), [11]),
        (runs(2, 3, 7, 9), [12, 17, 18]),
        (runs(1, 2, 3, 4, 8, 9), [11, 13, 18]),
        (runs(), []),
    ],
)
def test_a_row_serves_part_of_what_it_holds(tmp_path, wanted, ranks):
    fx.add(tmp_path, [("one", 12, STORED, [11, 12, 13, 16, 17, 18])])
    assert fx.missing(tmp_path, {"one": wanted}) == []
    assert fx.read(tmp_path, {"one": wanted}) == {"rank": ranks}


@pytest.mark.parametrize("wanted", [runs(4, 5), runs(3, 7), runs(1, 10), runs(1, 2, 5, 6)])
def test_a_row_does_not_serve_what_it_lacks_in_part(tmp_path, wanted):
    fx.add(tmp_path, [("one", 12, STORED, [11, 12, 13, 16, 17, 18])])
    assert fx.missing(tmp_path, {"one": wanted}) == [0]
    with pytest.raises(MissingPrior):
        fx.read(tmp_path, {"one": wanted})


def test_of_several_rows_the_first_part_by_name_that_serves_wins(tmp_path):
    rows = {
        "20250103T000000Z": (runs(1, 4), [31, 32, 33]),
        "20250101T000000Z": (runs(1, 2), [11]),
        "20250102T000000Z": (runs(1, 4), [21, 22, 23]),
    }
    for stamp, (spans_, ranks) in rows.items():
        fx.renamed(fx.add(tmp_path, [("one", 4, spans_, ranks)]), stamp)
    assert fx.read(tmp_path, {"one": runs(1, 2)}) == {"rank": [11]}
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [21, 22, 23]}
    assert fx.read(tmp_path, {"one": runs(2, 3)}) == {"rank": [22]}


def test_of_equal_keys_in_one_part_the_first_wins(tmp_path):
    fx.add(tmp_path, [("one", 4, runs(1, 2), [1]), ("one", 4, runs(1, 2), [2])])
    assert fx.read(tmp_path, {"one": runs(1, 2)}) == {"rank": [1]}


def test_a_part_that_lacks_a_column_does_not_serve(tmp_path):
    few = fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])], names=("rank",))
    fx.renamed(few, "20250101T000000Z")
    assert fx.missing(tmp_path, {"one": runs(1, 4)}, ("rank", "entropy")) == [0]
    fx.renamed(fx.add(tmp_path, [("one", 4, runs(1, 4), [4, 5, 6])]), "20250102T000000Z")
    assert fx.read(tmp_path, {"one": runs(1, 4)}, ("rank",)) == {"rank": [1, 2, 3]}
    assert fx.read(tmp_path, {"one": runs(1, 4)}, ("entropy",)) == {"entropy": [2.0, 2.5, 3.0]}


def test_a_float32_row_wins_over_an_earlier_one_in_half_precision(tmp_path):
    half = pa.array([[-9.0, -9.0, -9.0]], pa.list_(pa.float16()))
    fx.forge(tmp_path, fx.table(logprob=half))  # of 2025
    assert fx.read(tmp_path, {"one": runs(1, 2)}, ("logprob",)) == {"logprob": [-9.0]}
    fx.add(tmp_path, [("one", 4, runs(1, 2), [8])])
    assert fx.read(tmp_path, {"one": runs(1, 2)}, ("logprob",)) == {"logprob": [-1.0]}
    assert fx.read(tmp_path, {"one": runs(1, 3)}, ("logprob",)) == {"logprob": [-9.0, -9.0]}


def test_hidden_files_are_no_parts(tmp_path):
    part = fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    part.with_name("." + part.name).write_bytes(b"half a copy")
    part.with_name("notes.txt").write_bytes(b"no part")
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


def test_a_cache_of_another_prior_is_not_read(tmp_path):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    assert PriorCache(tmp_path, OTHER).missing(keys("one"), [runs(1, 4)], CORE) == [0]


def test_a_damaged_part_does_not_matter_to_rows_of_another(tmp_path):
    """Its hash is checked when its statistics are used, not before."""
    first = fx.renamed(fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])]), "20250101T000000Z")
    fx.add(tmp_path, [("two", 4, runs(1, 4), [4, 5, 6])])
    data = bytearray(first.read_bytes())
    data[data.index(b"prift")] ^= 1  # the name of the provenance: the index is as it was
    first.write_bytes(data)
    assert fx.read(tmp_path, {"two": runs(1, 4)}) == {"rank": [4, 5, 6]}
    with pytest.raises(CacheError, match=re.escape(str(first))):
        fx.read(tmp_path, {"two": runs(1, 4), "one": runs(1, 4)})


ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.booleans(), min_size=1, max_size=9)), max_size=8
)


@settings(deadline=None, max_examples=40)
@given(parts=st.lists(ROWS, max_size=4), asked=ROWS, group=st.integers(1, 12))
def test_reading_is_looking_up_the_first_row_that_covers(tmp_path_factory, parts, asked, group):
    """Against a list of rows and sets of positions; `group`: tokens of a row group."""
    root = tmp_path_factory.mktemp("cache")
    stored, rank = [], 0
    for number, rows in enumerate(parts):
        with CacheWriter(root, IDENTITY, {}) as writer, pytest.MonkeyPatch.context() as patch:
            patch.setattr("prift.store.writer._ROW_GROUP_TOKENS", group)
            for name, tail in rows:
                runs_ = spans.spans_of(np.array([False, *tail]))
                ranks = list(range(rank, rank + spans.count(runs_)))
                rank += len(ranks)
                writer.add(key(str(name)), len(tail) + 1, runs_, fx.stats(ranks))
                places = spans.positions_of(runs_).tolist()
                stored.append((str(name), dict(zip(places, ranks, strict=True))))
        if rows:
            (new,) = [p for p in fx.parts(root) if not p.name.startswith("1999")]
            fx.renamed(new, f"1999010{number}T000000Z")
    wanted = [spans.spans_of(np.array([False, *tail])) for _, tail in asked]
    expected = []
    for (name, _), runs_ in zip(asked, wanted, strict=True):
        places = spans.positions_of(runs_).tolist()
        serving = [row for k, row in stored if k == str(name) and set(places) <= set(row)]
        expected.append([serving[0][p] for p in places] if serving else None)
    cache = PriorCache(root, IDENTITY)
    asked_keys = keys(*(str(name) for name, _ in asked))
    lacking = [i for i, ranks in enumerate(expected) if ranks is None]
    assert cache.missing(asked_keys, wanted, CORE) == lacking
    there = [i for i in range(len(asked)) if i not in lacking]
    found = cache.read(asked_keys[there], [wanted[i] for i in there], CORE)
    flat = [rank for i in there for rank in expected[i]]
    assert found["rank"].tolist() == flat
    assert found["logprob"].tolist() == fx.stats(flat)["logprob"].tolist()


def test_a_listing_while_parts_are_taken_away_one_after_another(tmp_path, monkeypatch):
    """As a compaction does in a slow store: each listing names a part that is gone by its turn."""
    texts = [f"row {n}" for n in range(30)]
    for text in texts:
        fx.add(tmp_path, [(text, 4, runs(1, 4), [1, 2, 3])])
    whole = fx.add(tmp_path, [(text, 4, runs(1, 4), [1, 2, 3]) for text in texts])
    root, opened = open_root(tmp_path), []
    listing, source = root.parts, root.source

    def parts(prior):
        found = listing(prior)
        root.remove(prior, next(part.name for part in found if part.name != whole.name))
        return found

    def counted(prior, part):
        opened.append(part.name)
        return source(prior, part)

    monkeypatch.setattr(root, "parts", parts)
    monkeypatch.setattr(root, "source", counted)
    cache = PriorCache(root, IDENTITY, keys_only=True)
    assert cache.missing(keys(*texts), [runs(1, 4)] * len(texts), ("rank",)) == []
    gone = set(opened) - {path.name for path in fx.parts(tmp_path)}
    assert gone and all(opened.count(name) == 1 for name in set(opened) - gone)


def test_a_part_that_stays_and_is_none_is_an_error_in_any_listing(tmp_path):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    fx.place(tmp_path, b"no part")
    for keys_only in (True, False):
        with pytest.raises(CacheError, match="is damaged"):
            PriorCache(tmp_path, IDENTITY, keys_only=keys_only)


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_a_malformed_prior_is_passed_over_where_asked(tmp_path, text):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    (tmp_path / "0123456789abcdef").mkdir()
    file = tmp_path / "0123456789abcdef" / "prior.json"
    file.symlink_to("/dev/zero") if text is None else file.write_text(text)
    trouble = {}
    assert list_priors(tmp_path, trouble) == {IDENTITY.id: IDENTITY}
    assert list(trouble) == ["0123456789abcdef"]
    with pytest.raises(CacheError, match="0123456789abcdef/prior.json"):
        list_priors(tmp_path)


def test_a_prior_that_goes_while_it_is_listed_is_none(tmp_path, monkeypatch):
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    root = open_root(tmp_path)
    root.begin(OTHER.id, OTHER.json())
    identity = root.identity

    def late(prior, *rest):
        if prior == OTHER.id:
            root.remove_prior(prior)
        return identity(prior, *rest)

    monkeypatch.setattr(root, "identity", late)
    assert list_priors(root) == {IDENTITY.id: IDENTITY}
