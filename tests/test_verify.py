"""`prift cache verify`: every kind of damage has its message, and what is sound has none."""

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prift.errors import CacheError
from prift.identity import canonical_json
from prift.store.problems import Problem, Verified
from prift.store.remote import open_root
from prift.store.roots import MAX_PART, Root
from prift.store.verify import verify
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests import cli_fixtures as cli
from tests.cache_fixtures import IDENTITY, key, runs

FLOATS = pa.list_(pa.float32())
INTS = pa.list_(pa.int32())
HALF = pa.list_(pa.float16())


def checked(root) -> Verified:
    root = root if isinstance(root, Root) else open_root(root)
    return verify(root, root.priors())


def said(root) -> str:
    """What the one problem is said to be."""
    (problem,) = checked(root).problems
    return problem.line()


def sound_table(**changes) -> pa.Table:
    """Of the row 'one', 4 tokens, a coin's two sides and a first choice; with changed columns."""
    half = float(np.log(np.float32(0.5)))
    columns = {
        "logprob": pa.array([[half, half, -0.125]], FLOATS),
        "log_mass_rank": pa.array([[0.0, half, 0.0]], FLOATS),
        "rank": pa.array([[1, 2, 1]], INTS),
        "n_tie": pa.array([[1, 1, 1]], INTS),
        "entropy": pa.array([[0.75, 0.75, 0.5]], FLOATS),
    }
    return fx.table(**{**columns, **changes})


@pytest.fixture
def copy(lab, tmp_path) -> Path:
    """The lab's cache, to be damaged."""
    return shutil.copytree(lab.cache, tmp_path / "copy")


def part_of(cache: Path) -> Path:
    (path,) = cache.glob("*/parts/*.parquet")
    return path


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """The part with another table, under a name that fits."""
    buffer = io.BytesIO()
    pq.write_table(change(pq.read_table(path)), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:32]
    path.unlink()
    target = path.with_name(f"{path.name[:17]}{digest}.parquet")
    target.write_bytes(buffer.getvalue())
    return target


def with_value(table: pa.Table, name: str, row: int, place: int, value: float) -> pa.Table:
    column = table[name].to_pylist()
    column[row][place] = value
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(name), pa.array(column, table.schema.types[at]))


def test_a_sound_cache(lab):
    result = cli.prift("cache", "verify", "--cache", lab.cache, "--model", lab.model)
    assert cli.succeeded(result).startswith("0 problems in 1 prior, 1 part, ")
    found = json.loads(cli.succeeded(cli.prift("cache", "verify", "--cache", lab.cache, "--json")))
    size = part_of(Path(lab.cache)).stat().st_size
    table = pq.read_table(part_of(Path(lab.cache)))
    assert found == {
        "cache": lab.cache,
        "sound": True,
        "priors": 1,
        "parts": 1,
        "rows": table.num_rows,
        "tokens": sum(map(len, table["rank"].to_pylist())),
        "bytes": size,
        "problems": [],
        "deep": [],
    }


def test_sound_tables_have_no_problem(tmp_path):
    with CacheWriter(tmp_path, IDENTITY, {}):
        pass  # prior.json
    fx.forge(tmp_path, sound_table())
    for name in ("logprob", "log_mass_rank", "entropy"):
        column = sound_table()[name].to_pylist()
        fx.forge(
            tmp_path, sound_table(**{name: pa.array(np.array(column, np.float16).tolist(), HALF)})
        )
    assert checked(tmp_path).problems == []


def test_a_flipped_bit_anywhere(copy):
    path = part_of(copy)
    data = path.read_bytes()
    generator = random.Random(0)
    for at in [0, len(data) - 1, *generator.sample(range(len(data)), 20)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        assert "its content does not match the hash in its name" in said(copy), at
    path.write_bytes(data[:-1])
    assert "hash" in said(copy)
    path.write_bytes(data)
    assert checked(copy).problems == []


BAD_TABLES = {
    "no parquet": (b"PAR1", ["cannot be read as a part"]),
    "empty": (b"", ["cannot be read as a part"]),
    "no rank": (sound_table(rank=None), ["it lacks the core statistics rank"]),
    "no key": (sound_table(key=None), ["columns", "key"]),
    "key of text": (sound_table(key=pa.array(["one"])), ["column key is of the type string"]),
    "wide rank": (
        sound_table(rank=pa.array([[1, 2, 1]], pa.list_(pa.int64()))),
        ["column rank is of the type", "int64"],
    ),
    "null": (
        sound_table(entropy=pa.array([[0.75, None, 0.5]], FLOATS)),
        ["row group 0: ", "column entropy holds nulls"],
    ),
    "spans outside": (
        sound_table(length=pa.array([3], pa.int32())),
        ["row group 0, row 0: spans are no runs within the sequence: [1, 4] in 3 tokens"],
    ),
    "no length": (
        sound_table(
            length=pa.array([0], pa.int32()),
            **dict.fromkeys(
                ("spans", "logprob", "log_mass_rank", "entropy"), pa.array([[]], FLOATS)
            ),
        )
        .set_column(2, "spans", pa.array([[]], INTS))
        .set_column(5, "rank", pa.array([[]], INTS))
        .set_column(6, "n_tie", pa.array([[]], INTS)),
        ["row group 0, row 0: length is 0"],
    ),
    "spans from 0": (sound_table(spans=pa.array([[0, 3]], INTS)), ["[0, 3] in 4 tokens"]),
    "spans odd": (sound_table(spans=pa.array([[1, 4, 5]], INTS)), ["[1, 4, 5]"]),
    "a value short": (
        sound_table(entropy=pa.array([[0.75, 0.5]], FLOATS)),
        ["row 0: entropy has 2 values, the spans 3 positions"],
    ),
    "positive logprob": (
        sound_table(logprob=pa.array([[-1, -1, 0.5]], FLOATS)),
        ["row group 0, row 0, position 3: logprob is not 0 or less: logprob 0.5"],
    ),
    "rank 0": (
        sound_table(rank=pa.array([[1, 0, 0]], INTS)),
        ["position 2: rank is not 1 or more", "(2 in this row group)"],
    ),
    "u is 1 and rank is not": (
        sound_table(rank=pa.array([[1, 2, 2]], INTS)),
        ["position 3: log_mass_rank is 0, but rank is not 1"],
    ),
    "rank is 1 and u is not": (
        sound_table(rank=pa.array([[1, 1, 1]], INTS)),
        ["position 2: log_mass_rank is not 0, but rank is 1"],
    ),
    "entropy too low": (
        sound_table(entropy=pa.array([[0.75, 0.1, 0.5]], FLOATS)),
        ["position 2: entropy is below that of a coin with the token's probability"],
    ),
    "not a number": (
        sound_table(entropy=pa.array([[0.75, float("nan"), 0.5]], FLOATS)),
        ["position 2: entropy is not 0 or more"],
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_parts(name, tmp_path):
    content, words = BAD_TABLES[name]
    with CacheWriter(tmp_path, IDENTITY, {}):
        pass  # prior.json
    forged = (
        fx.place(tmp_path, content) if isinstance(content, bytes) else fx.forge(tmp_path, content)
    )
    found = checked(tmp_path).problems
    assert found and {problem.where for problem in found} == {str(forged)}
    for word in words:
        assert any(word in problem.line() for problem in found), [p.line() for p in found]
    assert all(f"delete {forged}" in problem.mend for problem in found)


def test_numbers_say_where_among_rows_and_row_groups(copy):
    path = part_of(copy)
    table = with_value(pq.read_table(path), "rank", 33, 1, -5)
    path = rewritten(path, lambda _: table)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=10)
    path.unlink()
    prior = path.parents[1].name
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:32]
    path = path.with_name(f"20250101T000000Z-{digest}.parquet")
    path.write_bytes(buffer.getvalue())
    first = int(table["spans"][33].as_py()[0])
    problem = next(p for p in checked(copy).problems if "1 or more" in p.what)
    assert problem == Problem(
        prior=prior, where=str(path), what=problem.what, mend=problem.mend,
        row_group=3, row=3, position=first + 1, statistic="rank",
    )  # fmt: skip


def test_a_foreign_name(copy):
    path = part_of(copy)
    path.rename(path.with_name(path.name[17:]))
    assert "its name is not <UTC time>-<32 hex digits>.parquet" in said(copy)


def test_a_link_out_of_the_cache(copy, tmp_path):
    path = part_of(copy)
    path.rename(tmp_path / "elsewhere.parquet")
    path.symlink_to(tmp_path / "elsewhere.parquet")
    cli_result = cli.prift("cache", "verify", "--cache", copy)
    assert cli_result.exit_code == 1 and "follows no links" in cli_result.output


IDENTITIES = {
    "cut": (lambda text: text[:-5], "is not a prior's identity"),
    "no text": (lambda text: "\udcff", "cannot be read"),
    "spaces": (lambda text: json.dumps(json.loads(text)), "not canonical"),
    "another": (
        lambda text: canonical_json({**json.loads(text), "dtype": "float16"}),
        "describes prior",
    ),
    "a field less": (lambda text: text.replace('"dtype"', '"type"'), "dtype"),
    "a list": (lambda text: "[]", "is not a prior's identity"),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_bad_identities(name, copy):
    change, word = IDENTITIES[name]
    (file,) = copy.glob("*/prior.json")
    text = change(file.read_text())
    file.write_bytes(text.encode(errors="surrogateescape"))
    (problem,) = checked(copy).problems
    assert problem.where == str(file) and word in problem.what
    assert f"delete {file}" in problem.mend


def test_parts_without_an_identity(copy):
    fx.add(copy, [("one", 5, runs(1, 2), [1])])
    (copy / IDENTITY.id / "prior.json").unlink()
    assert said(copy).startswith(f"{copy / IDENTITY.id}: it holds parts and no prior.json")
    (prior,) = open_root(copy).priors()
    assert verify(open_root(copy), [prior], whole=False).problems == []


def again(lab, cache) -> int:
    """Sequences that the same `prift precompute` command scores."""
    before, lab.cache = lab.cache, str(cache)
    try:
        return lab.precompute().scored
    finally:
        lab.cache = before


@pytest.mark.parametrize("name", sorted(IDENTITIES))
def test_what_mends_an_identity_mends_it(name, lab, copy):
    """The command is refused until it is deleted, and then writes it, though it scores nothing."""
    change, _ = IDENTITIES[name]
    (file,) = copy.glob("*/prior.json")
    right = file.read_bytes()
    file.write_bytes(change(file.read_text()).encode(errors="surrogateescape"))
    (problem,) = checked(copy).problems
    if "canonical" not in problem.what:
        with pytest.raises(CacheError, match=f"{file} .*prift cache verify --cache {copy}"):
            again(lab, copy)
    file.unlink()
    assert again(lab, copy) == 0
    assert file.read_bytes() == right and checked(copy).problems == []


def two_rows(root, first: list, second: list, spans=(1, 4), length: int = 4) -> None:
    """The row 'one' in two parts, the second with these spans and length; all first choices."""
    for edges, tokens, values in (((1, 4), 4, first), (spans, length, second)):
        count = len(values)
        stats = {
            "logprob": np.array(values, np.float32),
            "log_mass_rank": np.zeros(count, np.float32),
            "rank": np.ones(count, np.int32),
            "n_tie": np.ones(count, np.int32),
            "entropy": np.full(count, 2.0, np.float32),
        }
        with CacheWriter(root, IDENTITY, {}) as writer:
            writer.add(key("one"), tokens, runs(*edges), stats)


def test_duplicates(tmp_path):
    two_rows(tmp_path / "same", [-1, -1.5, -1.25], [-1, -1.50001, -1.25])
    assert checked(tmp_path / "same").problems == []
    two_rows(tmp_path / "part", [-1, -1.5, -1.25], [-1.5, -1.25], spans=(2, 4))
    assert checked(tmp_path / "part").problems == []
    two_rows(tmp_path / "other", [-1, -1.5, -1.25], [-1, -1.75, -1.25])
    assert "logprob is -1." in said(tmp_path / "other") and "position 2" in said(tmp_path / "other")
    two_rows(tmp_path / "shifted", [-1, -1.5, -1.25], [-1, -1.5], spans=(2, 4))
    assert "an earlier row with the same key" in said(tmp_path / "shifted")
    two_rows(tmp_path / "longer", [-1, -1.5, -1.25], [-1, -1.5, -1.25], spans=(1, 4), length=5)
    assert "says that it has" in said(tmp_path / "longer")


def test_every_problem_is_told_and_the_command_goes_on(copy, tmp_path):
    path = part_of(copy)
    prior = path.parents[1].name
    broken = path.with_name(f"20250101T000000Z-{'0' * 32}.parquet")
    broken.write_bytes(b"not at all")
    path = rewritten(path, lambda t: with_value(with_value(t, "rank", 1, 0, -1), "n_tie", 2, 0, 0))
    fx.add(copy, [("one", 5, runs(1, 2), [1])])  # another prior
    (copy / IDENTITY.id / "prior.json").write_text("{}")
    result = cli.prift("cache", "verify", "--cache", copy, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["sound"] and found["priors"] == 2 and found["parts"] == 3
    places = {(one["where"], one["row"], one["statistic"]) for one in found["problems"]}
    assert (str(broken), None, None) in places
    assert {(str(path), 1, "rank"), (str(path), 2, "n_tie")} <= places
    assert (str(copy / IDENTITY.id / "prior.json"), None, None) in places
    fields = {
        "prior",
        "where",
        "what",
        "mend",
        "row_group",
        "row",
        "position",
        "statistic",
        "count",
    }
    assert all(set(one) == fields for one in found["problems"])
    text = cli.prift("cache", "verify", "--cache", copy)
    assert text.exit_code == 1 and text.output.count("to mend: ") == 3
    alone = cli.prift("cache", "verify", prior[:5], "--cache", copy, "--json")
    assert {one["prior"] for one in json.loads(alone.stdout)["problems"]} == {prior}


def test_what_mends_it_mends_it(lab, tmp_path):
    copy = shutil.copytree(lab.cache, tmp_path / "copy")
    path = part_of(copy)
    path.write_bytes(path.read_bytes()[:-9])
    (problem,) = checked(copy).problems
    assert problem.mend.startswith(f"delete {path} and run the same `prift precompute` command")
    path.unlink()
    before, lab.cache = lab.cache, str(copy)
    try:
        assert lab.precompute().scored > 0
    finally:
        lab.cache = before
    assert checked(copy).problems == []


def test_on_a_store(lab, s3):
    path = part_of(Path(lab.cache))
    names = {p: f"cache/{p.relative_to(lab.cache)}" for p in (path, path.parents[1] / "prior.json")}
    for file, name in names.items():
        s3.put(name, file.read_bytes())
    words = ("cache", "verify", "--cache", s3.url(), "--json")
    assert json.loads(cli.succeeded(cli.prift(*words)))["tokens"] > 0
    root = open_root(s3.url())
    root.fetch(path.parents[1].name, root.parts(path.parents[1].name)[0])  # a sound copy here
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    s3.put(names[path], bytes(data))
    result = cli.prift(*words)
    (problem,) = json.loads(result.stdout)["problems"]
    assert result.exit_code == 1 and "hash" in problem["what"] and "s3://" in problem["where"]
    s3.put(names[path.parents[1] / "prior.json"], b"{}")
    assert len(json.loads(cli.prift(*words).stdout)["problems"]) == 2


def test_a_part_too_large_for_one_is_a_problem_and_the_others_are_checked(tmp_path):
    large = fx.add(tmp_path, [("one", 4, runs(1, 4), [1, 2, 3])])
    fx.add(tmp_path, [("two", 4, runs(1, 4), [1, 2, 3])])
    os.truncate(large, MAX_PART + 1)
    done = verify(open_root(tmp_path), [IDENTITY.id], whole=True)
    assert done.parts == 2
    (told,) = [p.what for p in done.problems if large.name in p.where]
    assert "too large for a part" in told
