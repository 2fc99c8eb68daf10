"""`prift weigh`: the shares of groups of tokens, by role, dataset and file."""

import json
from pathlib import Path

import numpy as np
import pytest

from prift.methods import weigher
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from tests import cli_fixtures as cli
from tests.lab import Lab
from tests.preview_references import check_groups, naive, run, weights_of, words
from tests.toy_tokenizers import byte_level

GROUP = {
    "examples", "label_tokens", "kept_share", "mean_weight", "share_of_tokens", "share_of_weight"
}  # fmt: skip


def spec_of(data, weights=()) -> DataSpec:
    return DataSpec(data=tuple(data), weights=weights, text=TextOptions(max_length=60))


def of_rule(lab, rule, spec) -> dict:
    (one,) = run(lab, weigher(rule, "prior", {}), spec=spec)["rules"]
    return one


@pytest.fixture
def split(lab, tmp_path) -> tuple[str, str]:
    """The lab's 40 rows as a folder of two files (10 and 5), and a file (25) that is called as one
    of them is."""
    lines = Path(lab.data).read_text().splitlines(keepends=True)
    ends = {"folder/a.jsonl": (0, 10), "folder/b.jsonl": (10, 15), "a.jsonl": (15, 40)}
    (tmp_path / "folder").mkdir()
    for name, (begin, end) in ends.items():
        (tmp_path / name).write_text("".join(lines[begin:end]))
    return str(tmp_path / "folder"), str(tmp_path / "a.jsonl")


def tables(shown: str) -> list[list[str]]:
    """The head of each table by group, and the names of its rows."""
    blocks = [block.splitlines() for block in shown.split("\n\n")]
    groups = [lines for lines in blocks if "share of tokens" in lines[0]]
    return [[head.split("  ")[0], *(row.split()[0] for row in rows)] for head, *rows in groups]


@pytest.mark.parametrize("rule", ["prob", "wit*prob"])
def test_shares_of_each_role(tmp_path, rule):
    lab = Lab(tmp_path, rows=10)
    lab.precompute(text={"labels": "all"})
    spec = lab.spec(labels="all")
    tokens = naive(lab, spec)
    rows = [json.loads(line) for line in Path(lab.data).read_text().splitlines()]
    prompts = [len(byte_level()(row["prompt"])["input_ids"]) for row in rows]
    for token in tokens:
        given = token["position"] < prompts[token["example"]]
        token["role"] = "prompt" if given else "response"
    factor = (
        {"prompt": 0.0, "response": 1.0} if rule == "wit*prob" else {"prompt": 1, "response": 1}
    )
    weights = np.array([t["prob"] * factor[t["role"]] for t in tokens])
    (one,) = run(lab, weigher(rule, "prior", {}), spec=spec)["rules"]
    assert [group["role"] for group in one["roles"]] == ["prompt", "response"]
    check_groups(one["roles"], lambda g, t: g["role"] == t["role"], tokens, weights)
    shown = cli.succeeded(cli.prift(*words(lab, "--rule", rule, "--labels", "all")))
    assert "\nrole " in shown and "\nprompt " in shown and "\nresponse " in shown


@pytest.mark.parametrize("rule", ["prob", "mass"])
@pytest.mark.parametrize(("weights", "sizes"), [((), (15, 25)), ((2, 0.5), (30, 13))])
def test_shares_of_each_dataset_and_file(lab, split, rule, weights, sizes):
    """Datasets follow each other: of a weight of 2 each example twice, of 0.5 a half, rounded."""
    spec = spec_of(split, weights)
    tokens = naive(lab, spec)
    for token in tokens:
        token["dataset"] = split[token["example"] >= sizes[0]]
        token["file"] = token["where"].rpartition(":")[0]
    weights_N = weights_of(tokens, rule)
    found = of_rule(lab, rule, spec)
    assert [set(one) for one in found["datasets"]] == [GROUP | {"dataset"}] * 2
    assert [set(one) for one in found["files"]] == [GROUP | {"dataset", "file"}] * 3
    assert [one["dataset"] for one in found["datasets"]] == list(split)
    assert [one["examples"] for one in found["datasets"]] == list(sizes)
    named = [(one["dataset"], one["file"]) for one in found["files"]]
    assert named == [(split[0], "a.jsonl"), (split[0], "b.jsonl"), (split[1], "a.jsonl")]
    check_groups(found["datasets"], lambda g, t: g["dataset"] == t["dataset"], tokens, weights_N)
    check_groups(
        found["files"],
        lambda g, t: (g["dataset"], g["file"]) == (t["dataset"], t["file"]),
        tokens,
        weights_N,
    )


def test_data_given_twice_are_two_datasets(lab):
    """Each with the examples that its own weight gives it."""
    spec = spec_of([lab.data] * 2, (1, 0.3))
    tokens = naive(lab, spec)
    weights = weights_of(tokens, "prob")
    found = of_rule(lab, "prob", spec)
    assert [(one["dataset"], one["examples"]) for one in found["datasets"]] == [
        (lab.data, 40), (lab.data, 12)
    ]  # fmt: skip
    for first, second in (found["datasets"], found["files"]):
        check_groups(
            [first, second],
            lambda group, token, first=first: (group is first) == (token["example"] < 40),
            tokens,
            weights,
        )
    more = ["--rule", "prob", "--data-weight", "1", "--data-weight", "0.3"]
    shown = cli.succeeded(cli.prift(*words(lab, *more, data=(lab.data, lab.data))))
    assert ["dataset", lab.data, lab.data] in tables(shown)
    assert "file" not in [head for head, *_ in tables(shown)]


def test_a_dataset_of_which_its_weight_leaves_nothing_is_told(lab, split):
    found = of_rule(lab, "prob", spec_of(split, (0.01, 1)))
    nothing, everything = found["datasets"]
    assert nothing == {
        "dataset": split[0], "examples": 0, "label_tokens": 0, "kept_share": None,
        "mean_weight": None, "share_of_tokens": 0, "share_of_weight": 0,
    }  # fmt: skip
    assert (everything["share_of_tokens"], everything["share_of_weight"]) == (1, 1)
    assert [(one["dataset"], one["file"]) for one in found["files"]] == [(split[1], "a.jsonl")]
    more = ["--rule", "prob", "--data-weight", "0.01", "--data-weight", "1", "--tokens", "0"]
    shown = cli.succeeded(cli.prift(*words(lab, *more, data=split)))
    (row,) = [line for line in shown.splitlines() if line.startswith(f"{split[0]} ")]
    assert row.split()[1:] == ["0", "0.0%", "none", "none", "0.0%"]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ((1,), [["dataset", "1"]]),
        ((0,), [["file", "a.jsonl", "b.jsonl"]]),
        ((1, 1), [["dataset", "1", "1"]]),
        ((0, 1), [["dataset", "0", "1"], ["dataset", "0", "0"]]),
    ],
)
def test_no_table_says_what_another_does(lab, split, chosen, expected):
    """By dataset where there are several; by file those datasets that have several."""
    data = tuple(split[i] for i in chosen)
    shown = cli.succeeded(cli.prift(*words(lab, "--rule", "prob", data=data)))
    names = {"0": split[0], "1": split[1]}
    found = [one for one in tables(shown) if one[0] in ("dataset", "file")]
    assert found == [[names.get(name, name) for name in one] for one in expected]
    if len(expected) == 2:
        heads = [line for line in shown.splitlines() if line.startswith("dataset ")]
        assert [line.split()[1] for line in heads] == ["label", "file"]


def test_many_files_are_cut_short_for_people(tmp_path):
    lab, folder = Lab(tmp_path, rows=25), tmp_path / "folder"
    lab.precompute()
    folder.mkdir()
    for i, line in enumerate(Path(lab.data).read_text().splitlines()):
        (folder / f"{i:02}.jsonl").write_text(line)
    lab.data = str(folder)
    shown = cli.succeeded(cli.prift(*words(lab, "--rule", "prob", "--tokens", "0")))
    assert "19.jsonl" in shown and "20.jsonl" not in shown
    assert "and 5 files more, which --json shows" in shown
    assert len(run(lab, weigher("prob", "prior", {}))["rules"][0]["files"]) == 25
