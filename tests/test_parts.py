"""One part: its columns and encodings, and that nothing damaged or foreign passes for one."""

import hashlib
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prift.cache import PriorCache
from prift.errors import CacheError
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, key, keys, runs, table


@pytest.fixture
def part(tmp_path):
    return fx.add(
        tmp_path, [("one", 4, runs(1, 4), [1, 2, 3]), ("two", 9, runs(1, 2, 5, 7), [4, 5, 6])]
    )


def test_the_columns_are_those_of_the_design(part):
    found = pq.ParquetFile(part).schema_arrow
    assert found.names == ["key", "length", "spans", *CORE]
    assert found.field("key").type == pa.binary(16)
    assert found.field("length").type == pa.int32()
    types = {name: str(found.field(name).type.value_type) for name in ("spans", *CORE)}
    assert types == {
        "spans": "int32",
        "logprob": "float",
        "log_mass_rank": "float",
        "rank": "int32",
        "n_tie": "int32",
        "entropy": "float",
    }


def test_any_parquet_reader_sees_the_rows(part):
    assert pq.read_table(part).to_pylist()[1] == {
        "key": b"two.............",
        "length": 9,
        "spans": [1, 2, 5, 7],
        "logprob": [-0.5, -0.625, -0.75],
        "log_mass_rank": [-0.75, -1.0, -1.25],
        "rank": [4, 5, 6],
        "n_tie": [1, 1, 1],
        "entropy": [2.0, 2.5, 3.0],
    }


def test_encodings(part):
    group = pq.ParquetFile(part).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    values = {c.path_in_schema.split(".")[0]: set(c.encodings) - {"RLE"} for c in columns}
    assert values["logprob"] == {"BYTE_STREAM_SPLIT"}
    assert values["entropy"] == {"BYTE_STREAM_SPLIT"}
    assert values["log_mass_rank"] == {"PLAIN"}
    assert values["rank"] == values["n_tie"] == {"PLAIN", "RLE_DICTIONARY"}
    dictionaries = [c.path_in_schema for c in columns if c.has_dictionary_page]
    assert dictionaries == ["rank.list.element", "n_tie.list.element"]
    assert {c.compression for c in columns} == {"ZSTD"}
    described = [c.path_in_schema for c in columns if c.is_stats_set]
    assert set(described) <= {"key", "length"}


def test_the_name_is_the_time_and_the_hash_of_the_bytes(part):
    stamp, digest = re.fullmatch(r"(\d{8}T\d{6}Z)-([0-9a-f]{32})\.parquet", part.name).groups()
    assert digest == hashlib.sha256(part.read_bytes()).hexdigest()[:32]
    assert stamp.startswith("20")


def test_a_forged_part_with_the_right_shape_is_read(tmp_path):
    """So that what the tests below refuse is refused for what they change."""
    fx.forge(tmp_path, table())
    assert fx.read(tmp_path, {"one": runs(1, 4)}, CORE) == {
        "logprob": [-1.0, -2.0, -3.0],
        "log_mass_rank": [0.0, -2.0, -3.0],
        "rank": [1, 2, 3],
        "n_tie": [1, 1, 1],
        "entropy": [0.5, 0.5, 0.5],
    }


def test_half_precision_is_widened(tmp_path):
    fx.forge(tmp_path, table(logprob=pa.array([[-1.5, -2.0, -3.0]], pa.list_(pa.float16()))))
    found = PriorCache(tmp_path, IDENTITY).read(keys("one"), [runs(2, 4)], ("logprob",))
    assert found["logprob"].dtype == np.float32
    assert found["logprob"].tolist() == [-2.0, -3.0]


def test_columns_that_prift_does_not_know_are_no_harm(tmp_path):
    fx.forge(tmp_path, table(more=pa.array(["x"])))
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


def test_rows_of_no_row_groups_and_of_empty_ones(tmp_path):
    fx.forge(tmp_path, table().slice(0, 0))
    fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


INTS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
WRONG = {
    "no key": {"key": None},
    "no length": {"length": None},
    "no spans": {"spans": None},
    "key of 8 bytes": {"key": pa.array([b"12345678"], pa.binary(8))},
    "key of any length": {"key": pa.array([key("one")], pa.binary())},
    "key as text": {"key": pa.array(["0123456789abcdef"])},
    "key null": {"key": pa.array([None], pa.binary(16))},
    "length int64": {"length": pa.array([4], pa.int64())},
    "length text": {"length": pa.array(["4"])},
    "length null": {"length": pa.array([None], pa.int32())},
    "spans int64": {"spans": pa.array([[1, 4]], pa.list_(pa.int64()))},
    "spans flat": {"spans": pa.array([4], pa.int32())},
    "spans null": {"spans": pa.array([None], INTS)},
    "spans hold a null": {"spans": pa.array([[1, None]], INTS)},
    "spans odd": {"spans": pa.array([[1, 2, 4]], INTS)},
    "spans unsorted": {"spans": pa.array([[3, 4, 1, 3]], INTS)},
    "spans touching": {"spans": pa.array([[1, 2, 2, 4]], INTS)},
    "spans at 0": {"spans": pa.array([[0, 3]], INTS)},
    "spans beyond the length": {"spans": pa.array([[1, 4, 5, 6]], INTS)},
    "spans with more positions": {"length": pa.array([9], pa.int32()), "spans": [[1, 5]]},
    "spans with fewer positions": {"spans": pa.array([[1, 3]], INTS)},
    "rank too short": {"rank": pa.array([[1, 2]], INTS)},
    "rank too long": {"rank": pa.array([[1, 2, 3, 4]], INTS)},
    "rank empty": {"rank": pa.array([[]], INTS)},
    "rank null": {"rank": pa.array([None], INTS)},
    "rank holds a null": {"rank": pa.array([[1, None, 3]], INTS)},
    "rank int64": {"rank": pa.array([[1, 2, 3]], pa.list_(pa.int64()))},
    "rank float": {"rank": pa.array([[1, 2, 3]], FLOATS)},
    "rank flat": {"rank": pa.array([1], pa.int32())},
    "logprob double": {"logprob": pa.array([[-1.0, -2, -3]], pa.list_(pa.float64()))},
    "logprob int": {"logprob": pa.array([[-1, -2, -3]], INTS)},
    "logprob holds a null": {"logprob": pa.array([[-1.0, None, -3.0]], FLOATS)},
    "logprob text": {"logprob": pa.array([["-1", "-2", "-3"]])},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_part_that_contradicts_the_schema_or_itself_is_refused(tmp_path, change):
    if isinstance(change.get("spans"), list):
        change = {**change, "spans": pa.array(change["spans"], INTS)}
    path = fx.forge(tmp_path, table(**change))
    with pytest.raises(CacheError, match=re.escape(str(path))):
        cache = PriorCache(tmp_path, IDENTITY)
        cache.read(keys("one"), [runs(1, 3)], ("rank", "logprob"))


def test_lists_whose_lengths_only_agree_in_sum_are_refused(tmp_path):
    two = pa.concat_tables([table(), table(key=pa.array([key("two")], pa.binary(16)))])
    rank = pa.array([[1, 2], [3, 4, 5, 6]], INTS)
    fx.forge(tmp_path, two.set_column(5, "rank", rank))
    with pytest.raises(CacheError, match="rank contradict its spans"):
        fx.read(tmp_path, {"two": runs(1, 4)})


def test_a_column_twice_is_refused(tmp_path):
    twice = table().append_column("rank", table()["rank"])
    fx.forge(tmp_path, twice)
    with pytest.raises(CacheError, match="damaged"):
        PriorCache(tmp_path, IDENTITY)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not a part\n" * 99, b"PAR1" * 50])
def test_a_file_that_is_no_parquet_is_refused(tmp_path, data):
    path = fx.place(tmp_path, data)
    with pytest.raises(CacheError, match=re.escape(str(path))):
        PriorCache(tmp_path, IDENTITY)


def test_a_part_under_another_name_is_refused(part, tmp_path):
    part.rename(part.with_name("mine.parquet"))
    with pytest.raises(CacheError, match="mine.parquet is damaged.*hash in its name"):
        fx.read(tmp_path, {"one": runs(1, 4)})


def test_a_part_that_vanishes_after_opening_is_an_error_of_the_cache(part, tmp_path):
    cache = PriorCache(tmp_path, IDENTITY)
    part.unlink()
    with pytest.raises(CacheError, match="No such file"):
        cache.read(keys("one"), [runs(1, 4)], ("rank",))


def damages(size):
    """Byte positions: the first 60, the last 900 (the footer) in steps, and some between."""
    rng = np.random.default_rng(0)
    return [*range(0, 60, 3), *rng.integers(60, size - 900, 60), *range(size - 900, size, 7)]


def test_a_flipped_bit_anywhere_is_found_before_a_value_is_used(part, tmp_path):
    good = part.read_bytes()
    places = damages(len(good))
    assert len(places) > 200
    for number, at in enumerate(places):
        bad = bytearray(good)
        bad[at] ^= 1 << number % 8
        part.write_bytes(bad)
        with pytest.raises(CacheError):
            fx.read(tmp_path, {"one": runs(1, 4), "two": runs(1, 2)}, CORE)
    part.write_bytes(good)
    assert fx.read(tmp_path, {"one": runs(1, 4)}) == {"rank": [1, 2, 3]}


def test_a_part_cut_short_or_grown_is_refused(part, tmp_path):
    good = part.read_bytes()
    for bad in (good[:-1], good[: len(good) // 2], good[:8], good + b"\0", good + good):
        part.write_bytes(bad)
        with pytest.raises(CacheError, match=re.escape(str(part))):
            fx.read(tmp_path, {"one": runs(1, 4)})


def test_the_message_says_how_to_mend(part, tmp_path):
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(CacheError, match="Delete the file and run the same `prift precompute`"):
        PriorCache(tmp_path, IDENTITY)
