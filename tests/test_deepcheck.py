"""`prift cache verify --deep`: numbers that are another model's, or were changed, are found, though
every hash fits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prift.agreement import disagreements
from prift.cache import list_priors
from prift.deepcheck import deepen
from prift.errors import CacheError, MissingPrior
from prift.store.problems import Verified
from prift.store.remote import open_root
from prift.store.writer import CacheWriter
from tests import cli_fixtures as cli
from tests.lab import Lab
from tests.refiled import changed, refile, rows_of, values_of


def deep(lab: Lab, cache, sample: int = 64, seed: int = 0) -> Verified:
    done, root = Verified(), open_root(cache)
    spec = lab.spec()
    deepen(root, root.priors(), lab.model, spec, done, sample, seed, say=lambda line: None)
    return done


@pytest.fixture(scope="module")
def other(lab, tmp_path_factory) -> Lab:
    """Another model of the same shape, and its cache of the same data."""
    other = Lab(tmp_path_factory.mktemp("other"), seed=1)
    other.data = lab.data
    other.precompute()
    return other


def test_the_model_agrees_with_itself(lab):
    words = ["--cache", lab.cache, "--deep", "--model", lab.model, "--data", lab.data]
    result = cli.prift("cache", "verify", *words, "--max-length", "60", "--sample", "9", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["sound"]
    (one,) = found["deep"]
    assert one["sequences"] == 9 and one["tokens"] > 9
    assert one["mean_difference"] < 1e-5 and one["bound"] == 1e-3
    text = cli.prift("cache", "verify", *words, "--max-length", "60", "--sample", "9")
    assert "9 sequences scored again" in cli.succeeded(text)


def test_the_sample_follows_from_the_seed(lab):
    first, again, another = (deep(lab, lab.cache, 5, seed).deep for seed in (0, 0, 1))
    assert first == again
    assert first[0]["tokens"] != another[0]["tokens"] or first != another


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"statistics": "extended"}, {"positions": "all"}]
)
def test_other_ways_of_scoring_agree_too(options, tmp_path):
    lab = Lab(tmp_path, rows=12)
    lab.precompute(**options)
    done = deep(lab, lab.cache, 5)
    assert done.problems == [] and done.deep[0]["sequences"] == 5


def test_another_model_is_told_by_its_identity(lab, other):
    with pytest.raises(CacheError, match="no prior in .* is of the model") as error:
        deep(other, lab.cache)
    (identity,) = list_priors(lab.cache).values()
    assert identity.id in str(error.value) and f"weights {identity.weights[:12]}" in str(
        error.value
    )


def test_another_models_numbers_under_this_ones_name(lab, other, tmp_path):
    identity = next(iter(list_priors(lab.cache).values()))
    keys, _, runs = rows_of(lab)
    cache = refile(lab, tmp_path / "forged", values_of(other.cache, keys, runs))
    done = deep(lab, cache)
    assert {problem.prior for problem in done.problems} == {identity.id}
    assert len(done.problems) > len(keys) / 2
    assert done.deep[0]["mean_difference"] > done.deep[0]["bound"]
    words = ["--cache", cache, "--deep", "--model", lab.model, "--data", lab.data]
    result = cli.prift("cache", "verify", *words, "--max-length", "60")
    assert result.exit_code == 1 and "the model says" in result.output
    assert "delete " in result.output


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logprob", lambda v: v - 0.05),
        ("entropy", lambda v: v + 0.05),
        ("log_mass_rank", lambda v: v * 1.2 - 0.05),
        ("rank", lambda v: v + 50),
        ("n_tie", lambda v: v + 9),
    ],
)
def test_one_changed_value(lab, name, change, tmp_path):
    keys, _, runs = rows_of(lab)
    values = values_of(lab.cache, keys, runs)
    row = next(i for i in range(len(keys)) if len(values[i]["rank"]) > 2)
    values[row][name][1] = change(values[row][name])[1]
    done = deep(lab, refile(lab, tmp_path / "cache", values))
    assert {problem.statistic for problem in done.problems} >= {name}
    problem = next(p for p in done.problems if p.statistic == name)
    assert f"data.jsonl:{row + 1}" in problem.what and problem.position == int(runs[row][0]) + 1
    (part,) = (tmp_path / "cache").glob("*/parts/*")
    assert problem.where == str(part) and f"delete {part}" in problem.mend


def test_shifted_columns(lab, tmp_path):
    done = deep(lab, changed(lab, tmp_path / "cache", lambda v: np.roll(v, 1)))
    assert len(done.problems) > 5


def test_a_damaged_cache_is_a_problem_and_not_the_end(lab, tmp_path):
    cache = Path(changed(lab, tmp_path / "cache", lambda v: v))
    (part,) = cache.glob("*/parts/*")
    part.write_bytes(part.read_bytes()[:-1])
    (problem,) = deep(lab, cache).problems
    assert "damaged" in problem.what


def test_data_that_the_cache_lacks(lab, tmp_path):
    other_data = cli.write_rows(tmp_path / "rows.jsonl")
    lab_like = Lab(tmp_path / "lab", rows=1)
    lab_like.model, lab_like.data = lab.model, other_data
    with pytest.raises(
        MissingPrior, match=r"holds none of the 6 sequences of --data.*--max-length"
    ):
        deep(lab_like, lab.cache)


def test_what_cannot_be_scored_here_is_said(lab, tmp_path):
    (identity,) = list_priors(lab.cache).values()
    keys, lengths, runs = rows_of(lab)
    values = values_of(lab.cache, keys, runs)
    with CacheWriter(tmp_path, replace(identity, backend="vllm"), {}) as writer:
        writer.add(bytes(keys[0]), int(lengths[0]), runs[0], values[0])
    said, done, root = [], Verified(), open_root(tmp_path)
    deepen(root, root.priors(), lab.model, lab.spec(), done, say=said.append)
    assert "cannot be scored again here (backend vllm" in said[0] and done.deep == []


def test_usage(lab):
    deep_only = cli.prift("cache", "verify", "--cache", lab.cache, "--deep", "--model", lab.model)
    cli.refused(deep_only, "--data", code=2)
    cli.refused(cli.prift("cache", "verify", "--cache", lab.cache, "--data", "x"), "--deep", code=2)


def test_near_ties_are_no_disagreement():
    """Two tokens of probability 0.4 that change places: rank 1 to 2, u from 1 to 0.6."""
    old = {
        "logprob": [-0.9163],
        "log_mass_rank": [0.0],
        "rank": [1],
        "n_tie": [1],
        "entropy": [1.0],
    }
    new = {**old, "log_mass_rank": [np.log(0.6)], "rank": [2]}
    old, new = ({n: np.array(v, np.float32) for n, v in one.items()} for one in (old, new))
    assert list(disagreements(old, new, ("float32",))) == []
    assert list(disagreements({**old, "rank": new["rank"]}, new, ("float32",))) == [
        ("log_mass_rank", 0)
    ]
    assert list(disagreements(old, {**old, "rank": new["rank"]}, ("float32",))) == [
        ("log_mass_rank", 0)
    ]
