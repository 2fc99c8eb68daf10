"""What no listed data use: found by keys, deleted only when asked, and never by a misreading."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from prift.cache import PriorCache, list_priors
from prift.errors import CacheError, DataError
from prift.models import load_config
from prift.request import request
from prift.store.compact import compact
from prift.store.gc import Use, examine, rewrite, sweep
from prift.store.remote import open_root
from prift.store.roots import Root
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from tests import cli_fixtures as cli
from tests.cache_fixtures import CORE

ROWS = [
    {"prompt": f"Question {n}: how many clips?", "completion": f" {n} clips."} for n in range(12)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A cache of three data sets, scored one after the other: a part each."""
    made = tmp_path_factory.mktemp("made")
    for n in range(3):
        data = cli.write_rows(made / f"{n}.jsonl", ROWS[4 * n : 4 * n + 4])
        cli.succeeded(cli.precompute(model, data, made / "cache"))
    return made


@pytest.fixture
def place(tmp_path, made):
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def use(place, model, *numbers, **options):
    text = TextOptions(**options.pop("text", {}))
    data = tuple(str(place / f"{n}.jsonl") for n in numbers)
    return Use(model, DataSpec(data=data, text=text), **options)


def parts(place) -> list[str]:
    return sorted(path.name for path in (place / "cache").rglob("*.parquet"))


def scored(place, model, number) -> str:
    """How many sequences of a data set another precompute would score."""
    said = cli.precompute(model, place / f"{number}.jsonl", place / "cache", "--json")
    return json.loads(cli.succeeded(said).splitlines()[-1])["scored"]


def test_parts_without_a_listed_sequence_go_and_the_others_stay(place, model):
    root = Root(place / "cache")
    (found,) = examine(root, [use(place, model, 0, 2)])
    assert (found.named, found.sequences, found.found) == (True, 8, 8)
    assert (found.parts, found.rows, found.used, found.unused_rows) == (3, 12, 8, 4)
    assert (len(found.unused), found.mixed_rows) == (1, 0)
    assert 0 < found.unused_bytes < found.bytes
    assert len(parts(place)) == 3
    sweep(root, [found])
    assert len(parts(place)) == 2
    assert [scored(place, model, n) for n in range(3)] == [0, 4, 0]


def test_a_part_that_is_used_in_part_stays(place, model):
    cli.write_rows(place / "0.jsonl", ROWS[:1])
    (found,) = examine(Root(place / "cache"), [use(place, model, 0)])
    assert (len(found.unused), found.used, found.mixed_rows) == (2, 1, 3)


def test_parts_that_are_used_in_part_are_made_anew(place, model):
    """What stays is what was, to the bit; a second time there is nothing to do."""
    root = Root(place / "cache")
    for n, path in enumerate(sorted((place / "cache").rglob("*.parquet"))):
        path.rename(path.with_name(f"2025010{n + 1}T000000Z-{path.name.partition('-')[2]}"))
    compact(root, grace=0)
    (found,) = examine(root, [use(place, model, 0, 2)])
    assert (found.unused, len(found.mixed), found.mixed_rows) == ([], 1, 4)
    (identity,) = list_priors(root).values()
    spec = use(place, model, 0, 2).spec
    asked = request(spec.load(Path(model), load_config(Path(model)))[0])
    before = PriorCache(root, identity).read(asked.keys, asked.spans, CORE)
    waited = []
    assert rewrite(root, [found], 7.0, wait=lambda s: waited.append((s, len(parts(place))))) == 1
    assert waited == [(7.0, 2)]
    assert len(parts(place)) == 1
    after = PriorCache(root, identity).read(asked.keys, asked.spans, CORE)
    assert all(before[name].tobytes() == after[name].tobytes() for name in CORE)
    (again,) = examine(root, [use(place, model, 0, 2)])
    assert (again.rows, again.used, again.mixed) == (8, 8, [])
    assert rewrite(root, [again], 0) == 0


def test_a_part_whose_second_another_has_is_not_made_anew(place, model):
    root = Root(place / "cache")
    for path in (place / "cache").rglob("*.parquet"):
        path.rename(path.with_name(f"20250101T000000Z-{path.name.partition('-')[2]}"))
    cli.write_rows(place / "0.jsonl", ROWS[:1])
    found = examine(root, [use(place, model, 0)])
    assert rewrite(root, found, 0) == 0
    assert len(parts(place)) == 3


def test_positions_and_weights_do_not_matter(place, model):
    listed = use(place, model, 0)
    spec = DataSpec(data=listed.spec.data, weights=(0.25,))
    (found,) = examine(Root(place / "cache"), [Use(model, spec)])
    assert found.used == 4


def test_several_uses_are_united(place, model):
    uses = [use(place, model, 0), use(place, model, 1, text={"max_length": 40})]
    (found,) = examine(Root(place / "cache"), uses)
    assert (found.sequences, found.used) == (8, 8)


def test_other_sequences_than_those_scored_are_refused(place, model):
    """Else all would seem unused."""
    changed = [{**row, "completion": row["completion"] + "!"} for row in ROWS]
    cli.write_rows(place / "0.jsonl", changed)  # what another template would make of the same rows
    with pytest.raises(CacheError, match="holds none of the 12 sequences.*--max-length"):
        examine(Root(place / "cache"), [use(place, model, 0)])
    assert len(parts(place)) == 3


def test_one_use_of_other_sequences_than_those_scored_is_refused_though_another_is_right(
    place, model
):
    """As --data without the --template they were scored with, beside a right --run."""
    cli.write_rows(place / "0.jsonl", [{**row, "completion": "!"} for row in ROWS[:4]])
    uses = [use(place, model, 1), use(place, model, 0)]
    with pytest.raises(CacheError, match="holds none of the 4 sequences of .*0.jsonl .*--template"):
        examine(Root(place / "cache"), uses)


def test_data_that_cannot_be_read_whole_delete_nothing(place, model):
    with open(place / "0.jsonl", "a") as file:
        file.write('{"prompt": "broken"\n')
    with pytest.raises(DataError, match="0.jsonl:5"):
        examine(Root(place / "cache"), [use(place, model, 0)])


def test_a_damaged_part_ends_it(place, model):
    (path, *_) = (place / "cache").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CacheError, match=path.name):
        examine(Root(place / "cache"), [use(place, model, 0)])


def test_another_prior_goes_only_when_that_is_asked_for(place, model, tmp_path):
    other = cli.make_model(tmp_path / "other", seed=1)
    cli.succeeded(cli.precompute(other, place / "0.jsonl", place / "cache"))
    root = Root(place / "cache")
    found = examine(root, [use(place, model, 0, 1, 2)])
    (foreign,) = [one for one in found if not one.named]
    assert (foreign.parts, len(foreign.unused), foreign.rows) == (1, 1, 0)
    sweep(root, found)
    assert len(parts(place)) == 4
    sweep(root, found, others=True)
    assert len(parts(place)) == 3
    assert not (place / "cache" / foreign.prior).exists()
    with pytest.raises(CacheError, match="holds no prior of .*other"):
        examine(root, [use(place, other, 0)])


def test_a_prior_of_which_nothing_is_used_goes_whole(place, model):
    """The same model's in another precision, of other data."""
    more = ("--dtype", "bfloat16")
    cli.succeeded(cli.precompute(model, place / "0.jsonl", place / "cache", *more))
    root = Root(place / "cache")
    found = examine(root, [use(place, model, 1)])
    assert sorted((one.parts, len(one.unused), one.used) for one in found) == [(1, 1, 0), (3, 2, 4)]
    sweep(root, found)
    assert root.priors() == [one.prior for one in found if one.used]


def test_a_prior_may_be_named_by_its_id_or_its_model(place, model, tmp_path):
    other = cli.make_model(tmp_path / "other", seed=1)
    cli.succeeded(cli.precompute(other, place / "0.jsonl", place / "cache"))
    (named,) = [
        one.prior for one in examine(Root(place / "cache"), [use(place, other, 0)]) if one.named
    ]
    for prior in (named, other):
        found = examine(Root(place / "cache"), [use(place, model, 0, prior=prior)])
        assert [one.prior for one in found if one.named] == [named]
    with pytest.raises(CacheError, match="no prior 0123456789abcdef. It holds"):
        examine(Root(place / "cache"), [use(place, model, 0, prior="0123456789abcdef")])


def test_what_was_written_meanwhile_stays(place, model):
    root = Root(place / "cache")
    found = examine(root, [use(place, model, 0)])
    cli.write_rows(place / "new.jsonl", [{"prompt": "new", "completion": " row"}])
    cli.succeeded(cli.precompute(model, place / "new.jsonl", place / "cache"))
    sweep(root, found)
    assert len(parts(place)) == 2
    assert [scored(place, model, n) for n in ("new", 0)] == [0, 0]


def test_what_dead_writers_left_goes_and_what_may_be_alive_stays(place, model):
    root = Root(place / "cache")
    folder = root.parts_folder(root.priors()[0])
    old, young = folder / ".elsewhere-1-0-aa.tmp", folder / ".elsewhere-1-0-bb.tmp"
    for path in (old, young):
        path.write_bytes(b"half a part")
    day = time.time() - 2 * 24 * 3600
    os.utime(old, (day, day))
    sweep(root, examine(root, [use(place, model, 0)]))
    assert [path.name for path in folder.glob(".*")] == [young.name]


def test_in_an_object_store(place, model, s3):
    from prift.store.copying import copy

    copy(Root(place / "cache"), open_root(s3.url()))
    root = open_root(s3.url())
    found = examine(root, [use(place, model, 1)])
    sweep(root, found)
    left = [name for name in s3.objects() if name.endswith(".parquet")]
    assert len(left) == 1
    (again,) = examine(root, [use(place, model, 1)])
    assert (again.rows, again.used, again.unused) == (4, 4, [])


def gc(place, model, *more):
    return cli.prift("cache", "gc", "--cache", place / "cache", "--model", model, *more)


def test_the_command_says_and_deletes_only_when_asked(place, model):
    said = cli.succeeded(gc(place, model, "--data", place / "1.jsonl"))
    assert "4 of 4 sequences have a row; 2 of 3 parts unused: 8 of 12 rows" in said
    assert "would go" in said and "add --delete" in said
    assert len(parts(place)) == 3
    said = cli.succeeded(gc(place, model, "--data", place / "1.jsonl", "--delete", "--json"))
    found = json.loads(said.splitlines()[-1])
    assert found["deleted"] is True and len(found["priors"][0]["unused"]) == 2
    assert len(parts(place)) == 1


def test_the_runs_of_others_count(place, model):
    cli.succeeded(
        cli.train(model, place / "2.jsonl", place / "out", "--eval-data", place / "1.jsonl")
    )
    run = place / "out" / "prift.yaml"
    assert "eval_data" in run.read_text()
    both = json.loads(
        cli.succeeded(gc(place, model, "--data", place / "0.jsonl", "--run", run, "--json"))
    )
    assert both["priors"][0]["used"] == 12
    alone = cli.prift("cache", "gc", "--cache", place / "cache", "--run", run, "--json")
    assert json.loads(cli.succeeded(alone))["priors"][0]["used"] == 8


def test_the_priors_of_a_run_count(place, model, tmp_path):
    """--prior may be given twice, and an id of digits alone is a number to YAML."""
    other = cli.make_model(tmp_path / "other", seed=1)
    cli.succeeded(cli.precompute(other, place / "1.jsonl", place / "cache"))
    root = Root(place / "cache")
    ids = root.priors()
    run = place / "run.yaml"
    text = f"model: {model}\ndata: {place / '1.jsonl'}\n"
    words = ("cache", "gc", "--cache", place / "cache", "--run", run, "--json")
    run.write_text(text + "prior:\n" + "".join(f"- {one}\n" for one in ids))
    found = json.loads(cli.succeeded(cli.prift(*words)))["priors"]
    assert [(one["named"], one["used"]) for one in found] == [(True, 4), (True, 4)]
    cli.succeeded(cli.train(model, place / "1.jsonl", tmp_path / "out", "--cache", place / "cache",
                            "--prior", ids[0]))  # fmt: skip
    own = cli.prift(*words[:5], tmp_path / "out" / "prift.yaml", "--json")
    named = [one["prior"] for one in json.loads(cli.succeeded(own))["priors"] if one["named"]]
    assert named == ids[:1]
    for number in ("1234567812345678", "0123456701234567"):  # the second is octal
        run.write_text(f"{text}prior: {number}\n")
        cli.refused(cli.prift(*words), f"holds no prior {number}. It holds")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name what is to stay"),
        (["--data", "x.jsonl", "--limit", "3"], "rows that are not read would seem unused"),
        (["--run", "RUN"], "it names no model or no data"),
    ],
)
def test_what_is_wrong_is_said(place, model, words, said):
    Path(place / "run.yaml").write_text("model: m\n")
    words = [str(place / "run.yaml") if word == "RUN" else word for word in words]
    cli.refused(gc(place, model, *words), said)
    assert len(parts(place)) == 3


def test_the_command_makes_parts_anew(place, model):
    root = Root(place / "cache")
    for n, path in enumerate(sorted((place / "cache").rglob("*.parquet"))):
        path.rename(path.with_name(f"2025010{n + 1}T000000Z-{path.name.partition('-')[2]}"))
    cli.write_rows(place / "0.jsonl", ROWS[:1])
    words = ["--data", place / "0.jsonl", "--rewrite", "--grace", "0"]
    said = cli.succeeded(gc(place, model, *words))
    assert "2 of 3 parts unused: 8 of 12 rows" in said
    assert "1 parts are used in part, 3 rows of them not" in said
    assert len(parts(place)) == 3
    assert "1 parts were made anew" in cli.succeeded(gc(place, model, *words, "--delete"))
    (found,) = examine(root, [use(place, model, 0)])
    assert (found.parts, found.rows, found.used) == (1, 1, 1)
