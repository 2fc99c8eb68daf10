"""`prift cache ls` and `info`: what they count, on a folder and a store, and what they make of
caches that others wrote."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.store import spans
from prift.store.histograms import EDGES, describe
from prift.store.inventory import Contents, choose
from prift.store.remote import open_root
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests import cli_fixtures as cli
from tests.cache_fixtures import CORE, IDENTITY, OTHER, key, runs


def json_of(*words) -> dict:
    return json.loads(cli.succeeded(cli.prift("cache", *words, "--json")))


@pytest.fixture
def two(tmp_path) -> Path:
    """Three sequences of one prior, one of them twice, and one of another prior."""
    root = tmp_path / "cache"
    fx.add(root, [("one", 5, runs(1, 4), [1, 2, 3]), ("two", 9, runs(2, 4, 6, 9), [4, 1, 1, 2, 3])])
    again = fx.add(root, [("one", 5, runs(1, 3), [1, 2]), ("tri", 3, runs(2, 3), [7])])
    fx.renamed(again, "29990101T000000Z")
    with CacheWriter(root, OTHER, {"prift": json.dumps({"model": "b", "revision": "12" * 8})}) as w:
        w.add(key("one"), 5, runs(1, 4), fx.stats([1, 1, 1]))
    return root


def test_ls_counts(two):
    found = json_of("ls", "--cache", two)
    assert found["cache"] == str(two)
    first, second = sorted(found["priors"], key=lambda one: one["prior"] != IDENTITY.id)
    assert first["prior"] == IDENTITY.id and second["prior"] == OTHER.id
    sizes = [path.stat().st_size for path in fx.parts(two)]
    assert {n: first[n] for n in ("sequences", "rows", "parts", "tokens", "bytes")} == {
        "sequences": 3, "rows": 4, "parts": 2, "tokens": 3 + 5 + 1, "bytes": sum(sizes),
    }  # fmt: skip
    assert first["statistics"] == list(CORE) and first["trouble"] == []
    assert (first["dtype"], first["logits_dtype"], first["backend"]) == ("float32", "float32", "hf")
    assert second["models"] == [{"model": "b", "revision": "12" * 8}]


def test_ls_as_text_and_on_a_terminal(two):
    said = cli.succeeded(cli.prift("cache", "ls", "--cache", two))
    head, *lines = said.splitlines()
    assert (
        head.split() == "prior model dtype backend sequences tokens size statistics newest".split()
    )
    assert {line.split()[0] for line in lines} == {IDENTITY.id, OTHER.id}
    assert "b@12121212" in said and len({line.index("core") for line in lines}) == 1
    reader, writer = os.openpty()
    command = [cli.PRIFT, "cache", "ls", "--cache", two]
    done = subprocess.run(command, stdout=writer, timeout=120, env={**os.environ, "COLUMNS": "160"})
    os.close(writer)
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert done.returncode == 0 and "─" in shown and IDENTITY.id in shown


def test_nothing_there(tmp_path):
    assert json_of("ls", "--cache", tmp_path / "no")["priors"] == []
    assert "holds no prior" in cli.succeeded(cli.prift("cache", "ls", "--cache", tmp_path / "no"))
    for command in ("info", "verify"):
        result = cli.prift("cache", command, "--cache", tmp_path / "no")
        cli.refused(result, "holds no prior", "prift precompute")


def test_which_prior(two):
    for name in (IDENTITY.id, IDENTITY.id[:6]):
        assert json_of("info", name, "--cache", two)["prior"] == IDENTITY.id
    for words in (["info"], ["info", "zz"], ["verify", "zz"]):
        cli.refused(cli.prift("cache", *words, "--cache", two), IDENTITY.id, OTHER.id, "Name one")
    shutil.copytree(two / OTHER.id, two / f"{OTHER.id[:4]}{'0' * 12}")
    said = cli.refused(cli.prift("cache", "info", OTHER.id[:4], "--cache", two), "2 priors")
    assert IDENTITY.id not in said
    assert choose(open_root(two), [OTHER.id, IDENTITY.id, OTHER.id[:8]]) == [OTHER.id, IDENTITY.id]


def test_info_of_real_numbers(lab):
    """Against the table itself, read by pyarrow alone."""
    found = json_of("info", "--cache", lab.cache)
    (path,) = Path(lab.cache).glob("*/parts/*")
    table = pq.read_table(path).to_pydict()
    assert found["identity"] == json.loads((path.parents[1] / "prior.json").read_text())
    (group,) = found["provenance"]
    assert (group["facts"]["model"], group["parts"]) == ("model", 1)
    assert group["rows"] == found["rows"] == len(table["key"])
    lengths = np.array(table["length"])
    shown = [found["lengths"][n] for n in ("min", "median", "max")]
    assert shown == [lengths.min(), np.median(lengths), lengths.max()]
    assert sum(one["count"] for one in found["lengths"]["bins"]) == len(lengths)
    tokens = sum(map(len, table["rank"]))
    assert found["tokens"] == found["sampled_tokens"] == tokens
    assert found["covered"] == pytest.approx(tokens / (lengths - 1).sum())
    assert found["bytes_per_token"] == pytest.approx(path.stat().st_size / tokens)
    for name in CORE:
        values = np.concatenate(table[name])
        values = np.exp(values) if name == "log_mass_rank" else values
        one = found["histograms"][name]
        assert one["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert sum(b["count"] for b in one["bins"]) == tokens
        assert len(one["bins"]) == len(EDGES[name]) - 1
    ranks = np.concatenate(table["rank"])
    assert found["histograms"]["rank"]["bins"][0]["count"] == (ranks == 1).sum()
    said = cli.succeeded(cli.prift("cache", "info", "--cache", lab.cache))
    for word in (
        "identity",
        "provenance of 1 part",
        "coverage",
        "bytes per token",
        "mass rank u",
        "█",
    ):
        assert word in said


def test_a_sample_takes_whole_row_groups_and_is_the_same_each_time(tmp_path):
    for number in range(4):
        fx.add(tmp_path, [(str(number), 9, runs(1, 6), [1, 2, 3, 4, 5 + number])])
    contents = Contents(open_root(tmp_path), IDENTITY.id)
    found = describe(contents, tokens=6)
    assert found["sampled_tokens"] == 10 and found["tokens"] == 20
    assert describe(contents, tokens=6) == found


def test_counts_put_each_value_where_its_label_says(tmp_path):
    fx.add(tmp_path, [("one", 9, runs(1, 9), [1, 2, 3, 5, 6, 10, 11, 100])])
    found = describe(Contents(open_root(tmp_path), IDENTITY.id))["histograms"]["rank"]["bins"]
    assert [one["count"] for one in found] == [1, 1, 2, 2, 2, 0, 0, 0]
    said = cli.succeeded(cli.prift("cache", "info", "--cache", tmp_path))
    for label in ("3 to 5", "6 to 10", "11 to 100"):
        assert label in said


ROWS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from([(1, 3), (1, 5), (2, 4), (1, 2, 3, 5)]),
        st.sampled_from([CORE, CORE[:4]]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_unused_rows_are_those_that_an_earlier_one_covers(rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("unused")
    with CacheWriter(root, IDENTITY, {}) as writer:
        for name, edges, names in rows:
            count = spans.count(runs(*edges))
            writer.add(key(name), 6, runs(*edges), fx.stats([1] * count, names))
    contents = Contents(open_root(root), IDENTITY.id)
    listed = []  # in the order that readers see: part after part
    for path in fx.parts(root):
        table = pq.read_table(path)
        for row_key, row_spans in zip(
            table["key"].to_pylist(), table["spans"].to_pylist(), strict=True
        ):
            places = set(spans.positions_of(runs(*row_spans)).tolist())
            listed.append((row_key, places, set(table.column_names)))
    expected = [
        any(k == key_ and places <= p and names <= n for k, p, n in listed[:i])
        for i, (key_, places, names) in enumerate(listed)
    ]
    assert contents.unused.tolist() == expected
    assert contents.first.sum() == len({row[0] for row in rows})


def test_what_cannot_be_read_is_said_and_passed_over(two):
    fx.place(two, b"no parquet")
    (two / OTHER.id / "prior.json").write_text("{")
    result = cli.prift("cache", "ls", "--cache", two, "--json")
    found = {one["prior"]: one for one in json.loads(result.stdout)["priors"]}
    assert found[IDENTITY.id]["sequences"] == 3 and "damaged" in found[IDENTITY.id]["trouble"][0]
    assert found[OTHER.id]["dtype"] is None and found[OTHER.id]["sequences"] == 1
    assert "prior.json" in found[OTHER.id]["trouble"][0]
    shown = cli.prift("cache", "ls", "--cache", two)
    assert shown.exit_code == 0 and shown.stderr.count("left out: ") == 2
    assert "cannot be read" in cli.succeeded(cli.prift("cache", "info", OTHER.id, "--cache", two))


@pytest.mark.parametrize(
    "text",
    ["no json", "[1, [2]]", "[" * 5000, '{"model": {"a": [NaN, 1e999]}, "x": "\\u001b[2J\\u0000"}'],
)
def test_provenance_is_what_others_wrote(text, tmp_path):
    with CacheWriter(tmp_path, IDENTITY, {"prift": text}) as writer:
        writer.add(key("one"), 5, runs(1, 3), fx.stats([1, 2]))
    for command in ("ls", "info"):
        said = cli.succeeded(cli.prift("cache", command, "--cache", tmp_path))
        assert all(c.isprintable() or c == "\n" for c in said)
        json.loads(
            cli.succeeded(cli.prift("cache", command, "--cache", tmp_path, "--json")),
            parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
        )


def test_a_compacted_part_has_the_facts_of_all(tmp_path):
    facts = [{"model": "a", "date": "2026-01-01"}, {"model": "a", "date": "2026-01-02"}]
    with CacheWriter(tmp_path, IDENTITY, {"prift": json.dumps([*facts, {"model": "c"}])}) as writer:
        writer.add(key("one"), 5, runs(1, 3), fx.stats([1, 2]))
    found = json_of("info", "--cache", tmp_path)
    assert [one["model"] for one in found["models"]] == ["a", "c"]
    first = found["provenance"][0]
    assert (first["from"], first["to"]) == ("2026-01-01", "2026-01-02")


def test_a_store_is_listed_where_it_lies(two, s3, tmp_path):
    for path in two.rglob("*"):
        if path.is_file():
            s3.put(f"cache/{path.relative_to(two)}", path.read_bytes())
    changing = {"cache", "newest"}
    for words in (["ls"], ["info", IDENTITY.id]):
        here, there = json_of(*words, "--cache", two), json_of(*words, "--cache", s3.url())
        for one in [*here.pop("priors", []), *there.pop("priors", []), here, there]:
            for name in changing & set(one):
                del one[name]
        assert here == there
    assert not list((tmp_path / "copies").rglob("*.parquet"))
