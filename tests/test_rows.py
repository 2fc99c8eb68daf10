"""Files, folders and hub names -> rows, each with its place."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prift.errors import DataError, OptionError
from prift.text.rows import read_rows


def rows(data, split=None):
    return [(row.where, row.data) for row in read_rows(str(data), split)]


def test_jsonl_rows_have_their_line_and_blank_lines_are_no_rows(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert rows(file) == [("d.jsonl:1", {"a": 1}), ("d.jsonl:3", {"a": 2})]


def test_a_line_separator_inside_a_string_does_not_end_a_line(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"a": "x\u2028y\x85"}\n{"a": 2}\n', encoding="utf-8")
    assert rows(file) == [("d.jsonl:1", {"a": "x\u2028y\x85"}), ("d.jsonl:2", {"a": 2})]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert rows(file) == [("d.jsonl:1", {"a": 1}), ("d.jsonl:2", {"a": 2})]


def test_json_array(tmp_path):
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{"a": 1}, {"a": 2}], indent=2))
    assert rows(file) == [("d.json:1", {"a": 1}), ("d.json:2", {"a": 2})]


def test_json_lines_in_a_json_file(tmp_path):
    file = tmp_path / "d.json"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert rows(file) == [("d.json:1", {"a": 1}), ("d.json:2", {"a": 2})]


def test_one_object_is_one_row(tmp_path):
    file = tmp_path / "d.json"
    file.write_text('{"a": "x"}')
    assert rows(file) == [("d.json:1", {"a": "x"})]


def test_parquet_streams_and_loses_the_none_that_structs_are_padded_with(tmp_path):
    table = pa.Table.from_pylist(
        [{"a": 1, "m": [{"role": "user"}]}, {"a": None, "m": [{"role": "tool", "name": "f"}]}]
    )
    pq.write_table(table, tmp_path / "d.parquet")
    assert rows(tmp_path / "d.parquet") == [
        ("d.parquet:1", {"a": 1, "m": [{"role": "user"}]}),
        ("d.parquet:2", {"a": None, "m": [{"role": "tool", "name": "f"}]}),
    ]


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_the_first_rows_of_a_big_file_do_not_need_the_rest(tmp_path, name):
    many = [{"a": i} for i in range(5000)]
    if name == "d.jsonl":
        # A broken line further on is met only by who reads that far.
        lines = "\n".join(json.dumps(row) for row in many)
        (tmp_path / name).write_text(lines + "\n{broken\n")
    else:
        pq.write_table(pa.Table.from_pylist(many), tmp_path / name, row_group_size=1000)
    head = itertools.islice(read_rows(str(tmp_path / name)), 3)
    assert [row.data for row in head] == many[:3]


def test_a_folder_gives_its_files_in_sorted_order_and_ignores_others(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"a": 3}\n')
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}]')
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.jsonl").write_text("not data")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.jsonl").write_text('{"a": 4}\n')
    assert [where for where, _ in rows(tmp_path)] == [
        "a.json:1",
        "a.json:2",
        "b.jsonl:1",
        "more/c.jsonl:1",
    ]


def test_split_picks_the_files_named_after_it(tmp_path):
    for name in ("train-0.jsonl", "train.jsonl", "training.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"a": name}) + "\n")
    assert [row["a"] for _, row in rows(tmp_path, "train")] == ["train-0.jsonl", "train.jsonl"]
    with pytest.raises(OptionError, match=r"no file named dev\.\* or dev-\* .* it has test.jsonl"):
        rows(tmp_path, "dev")


def test_a_folder_of_several_splits_wants_one_named(tmp_path):
    for name in ("train.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(OptionError, match=r"several splits \(test, train\): choose one with --s"):
        rows(tmp_path)


def test_split_of_a_single_file(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(OptionError, match="--split train has no meaning for the single file"):
        rows(tmp_path / "d.jsonl", "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a": \n', r"d.jsonl:2 is not JSON .* Found: '{\"a\":'"),
        ("d.jsonl", b'{"a": "\xff"}\n', r"d.jsonl:1 is not JSON .*utf-8"),
        ("d.jsonl", b"[1, 2]\n", r"d.jsonl:1 is of type list, where an object \(a row\) is wanted"),
        ("d.json", b'[{"a": 1}, 7]', r"d.json:2 is of type int, where an object"),
        ("d.json", b'[{"a": 1},', r"d.json is not JSON"),
        ("d.json", b'{"a": 1}\n{"a"\n', r"d.json:2 is not JSON"),
        (
            "d.json",
            b'{\n "21645374": {"Q": 1},\n "16418930": {"Q": 2}\n}',
            r"one object of 2 objects \(keys '21645374', '16418930', ...\), where an array of rows",
        ),
        ("d.parquet", b"PAR1 not really", r"d.parquet cannot be read as Parquet"),
        ("d.csv", b"a,b\n", r"d.csv is not a data file that prift reads: .json, .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows(tmp_path / name)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(DataError, match="holds no .json, .jsonl, .ndjson, .parquet file"):
        rows(tmp_path)


@pytest.mark.parametrize("name", ["./nothing", "no/such/file", "nothing.jsonl"])
def test_a_missing_file_is_not_sought_on_the_hub(name):
    with pytest.raises(DataError, match=f"--data {name}: no such file or folder$"):
        rows(name)


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"--data nobody/nothing:main: no such file .*'validation'"):
        rows("nobody/nothing:main", "validation")
