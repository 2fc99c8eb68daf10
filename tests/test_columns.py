"""A cache's statistics beside token ids that other programs hold."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig

import prift
from prift import attach, look_up, open_prior
from prift.cache import PriorCache, sequence_key
from prift.errors import CacheError, DataError, MissingPrior, OptionError
from prift.store.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, OTHER, runs

ROWS = [
    # ids, label mask, what `stats` makes of the ranks 10, 11, ... at the positions 1, 2, ...
    ([5, 6, 7, 8], "0110"),
    ([1, 2], "01"),
    ([3, 4, 9], "111"),
    ([7, 7, 7, 7, 7], "00000"),  # nothing is asked for, and nothing stored
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Where datasets keeps what `map` made."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def stored(root, rows=ROWS[:3], identity=IDENTITY) -> PriorCache:
    """A cache with all positions of these rows; position t of any row has the rank 9 + t."""
    with CacheWriter(root, identity, {"prift": json.dumps({"model": "some/model"})}) as writer:
        for ids, _ in rows:
            ranks = 9 + np.arange(1, len(ids))
            key = sequence_key(np.array(ids, np.int32))
            writer.add(key, len(ids), runs(1, len(ids)), fx.stats(ranks))
    return PriorCache(root, identity)


def columns(rows=ROWS) -> dict[str, list]:
    found = {"input_ids": [ids for ids, _ in rows], "labels": [], "name": list(range(len(rows)))}
    for ids, mask in rows:
        found["labels"].append([i if m == "1" else -100 for i, m in zip(ids, mask, strict=True)])
    return found


def dataset(rows=ROWS) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns(rows))


def expected(rows=ROWS) -> list[list[int]]:
    """The ranks that belong beside the ids; 0 where none does."""
    return [
        [9 + t if m == "1" and t else 0 for t, m in enumerate(mask)] for _, mask in rows
    ]  # fmt: skip


def test_a_column_for_each_statistic_beside_the_ids(tmp_path):
    found = attach(dataset(), stored(tmp_path), CORE)
    assert found.column_names == ["input_ids", "labels", "name", *(f"prior_{n}" for n in CORE)]
    assert found["prior_rank"][:] == expected()
    for name, values in fx.stats(range(99)).items():
        kind = "float32" if values.dtype == np.float32 else "int32"
        assert found.features[f"prior_{name}"].feature.dtype == kind
        for row, ranks in zip(found[f"prior_{name}"], expected(), strict=True):
            nothing = np.nan if kind == "float32" else 0
            wanted = np.where(ranks, values[ranks], nothing)
            np.testing.assert_array_equal(np.array(row, values.dtype), wanted)
    assert found.remove_columns([f"prior_{n}" for n in CORE])[:] == dataset()[:]


def test_the_columns_go_with_their_rows(tmp_path):
    found = attach(dataset(), stored(tmp_path), ["rank"])
    for moved in (
        found.shuffle(seed=1),
        found.select([3, 0, 0]),
        found.filter(lambda r: r["name"]),
    ):
        assert moved["prior_rank"][:] == [expected()[n] for n in moved["name"]]
    split = found.train_test_split(2, seed=0)["test"]
    assert split["prior_rank"][:] == [expected()[n] for n in split["name"]]


def test_a_dataset_that_was_shuffled_or_has_a_format(tmp_path):
    cache, plain = stored(tmp_path), dataset()
    moved = plain.shuffle(seed=3).select([2, 0, 1])
    assert attach(moved, cache, ["rank"])["prior_rank"][:] == [expected()[n] for n in moved["name"]]
    numpy = attach(plain.with_format("numpy"), cache, ["rank"])
    assert isinstance(numpy[0]["prior_rank"], np.ndarray)
    some = attach(plain.with_format("torch", columns=["input_ids"]), cache, ["rank"])
    assert set(some[0]) == {"input_ids", "prior_rank"}
    assert set(some.with_format(None)[0]) == {"input_ids", "labels", "name", "prior_rank"}


def test_many_batches_and_files(tmp_path):
    rows = [([n, n + 1, n + 2, n % 7], "0101"[: 4 - n % 2] + "1" * (n % 2)) for n in range(2500)]
    cache = stored(tmp_path / "cache", rows)
    dataset(rows).to_parquet(tmp_path / "rows.parquet")
    load = {"data_files": str(tmp_path / "rows.parquet"), "split": "train"}
    read = datasets.load_dataset("parquet", cache_dir=str(tmp_path / "loaded"), **load)
    found = attach(read, cache, ["rank"])
    assert found["prior_rank"][:] == expected(rows)
    again = attach(read, cache, ["rank"])
    assert again.cache_files == found.cache_files != []  # datasets knew it again


def test_what_was_made_before_is_not_taken_for_what_a_fuller_cache_gives(tmp_path):
    dataset().to_parquet(tmp_path / "rows.parquet")
    load = {"data_files": str(tmp_path / "rows.parquet"), "split": "train"}
    read = datasets.load_dataset("parquet", cache_dir=str(tmp_path / "loaded"), **load)
    before = attach(read, stored(tmp_path / "cache", ROWS[:1]), ["rank"], missing="nan")
    assert before["prior_rank"][:] == [expected()[0], [0, 0], [0, 0, 0], [0] * 5]
    after = attach(read, stored(tmp_path / "cache", ROWS[1:3]), ["rank"], missing="nan")
    assert after["prior_rank"][:] == expected()


def test_rows_that_lack_are_counted_and_the_message_says_what_to_run(tmp_path):
    cache = stored(tmp_path, ROWS[:1])
    with pytest.raises(MissingPrior) as caught:
        attach(dataset(), cache, ["rank"])
    assert str(caught.value) == (
        f"2 of 4 sequences have no prior in {cache.folder} (first: row 1, counted from 0). Write "
        "them to a file with the columns input_ids and labels (-100 where nothing is asked for), "
        "and run:\n  prift precompute --model some/model --data rows.jsonl --cache "
        f"{tmp_path} --dtype float32 --attention sdpa"
    )
    found = attach(dataset(), cache, ["logprob"], missing="nan")["prior_logprob"][:]
    assert np.isnan(np.concatenate(found[1:])).all() and np.isfinite(found[0][1:3]).all()


def test_what_to_run_names_the_store_as_given_and_the_statistics_that_lack(tmp_path, s3):
    """Without the URL's options the command would go to another store."""
    assert "&endpoint_override=" in s3.url()
    command = f"--data DATA --cache {shlex.quote(s3.url())} --statistics extended"
    with pytest.raises(CacheError) as caught:
        open_prior(s3.url(), names=["collision"])
    assert str(caught.value).endswith(f"prift precompute --model MODEL {command}")
    cache = stored(s3.url())
    command = command.replace("DATA", "rows.jsonl")
    for ask in (
        lambda: attach(dataset(), cache, ["logprob", "collision"]),
        lambda: look_up(cache, [[5, 6, 7, 8]], names=["collision"]),
    ):
        with pytest.raises(MissingPrior) as caught:
            ask()
        assert f"{command} --dtype float32" in str(caught.value)


def test_a_mask_instead_of_labels_and_all_tokens(tmp_path):
    cache = stored(tmp_path)
    masked = dataset(ROWS[:3]).remove_columns("labels")
    for kind in (int, bool):
        masks = [[kind(int(c)) for c in mask] for _, mask in ROWS[:3]]
        given = masked.add_column("completion_mask", masks)
        found = attach(given, cache, ["rank"], mask="completion_mask")
        assert found["prior_rank"][:] == expected(ROWS[:3])
    found = attach(masked, cache, ["rank"], labels=None)
    assert found["prior_rank"][:] == [[0, 10, 11, 12], [0, 10], [0, 10, 11]]


def test_padding_on_the_right_is_no_part_of_the_sequence(tmp_path):
    cache = stored(tmp_path)
    padded = {
        "input_ids": [[5, 6, 7, 8, 0, 0], [1, 2, 0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
        "labels": [[-100, 6, 7, -100, -100, -100], [-100, 2, -100, -100, -100, -100]],
    }
    found = attach(datasets.Dataset.from_dict(padded), cache, ["rank"])
    assert found["prior_rank"][:] == [[0, 10, 11, 0, 0, 0], [0, 10, 0, 0, 0, 0]]
    padded["attention_mask"][0] = [0, 0, 1, 1, 1, 1]
    with pytest.raises(DataError, match="attention_mask has holes"):
        attach(datasets.Dataset.from_dict(padded), cache, ["rank"])


@pytest.mark.parametrize(
    ("changes", "options", "kind", "words"),
    [
        ({"labels": [[6, 7]]}, {}, DataError, "a label that is not its token"),
        ({"labels": [[1]]}, {}, DataError, "equally long"),
        ({"input_ids": [[1, -2]]}, {"labels": None}, DataError, "no token id"),
        ({"input_ids": [[1, 2**31]]}, {"labels": None}, DataError, "no token id"),
        ({"input_ids": [[1.0, 2.0]]}, {"labels": None}, DataError, "list of whole numbers"),
        ({"input_ids": [[1, None]]}, {"labels": None}, DataError, "nulls"),
        ({"input_ids": ["ab"]}, {"labels": None}, DataError, "list of whole numbers"),
        ({}, {"labels": "targets"}, OptionError, "no column 'targets', only"),
        ({}, {"mask": "completion_mask"}, OptionError, "no column 'completion_mask'"),
        ({"prior_rank": [[1]]}, {}, OptionError, "a column 'prior_rank' already"),
        ({"seq_lengths": [[1, 1]]}, {}, OptionError, "attach before packing"),
        ({}, {"names": ["ranks"]}, OptionError, "'ranks' is no statistic"),
        ({}, {"names": "rank"}, OptionError, "'rank' is no statistic, or no list"),
        ({}, {"prior": "0123456789abcdef"}, CacheError, "holds no prior 0123456789abcdef"),
    ],
)
def test_what_is_refused(tmp_path, changes, options, kind, words):
    stored(tmp_path)
    rows = {"input_ids": [[1, 2]], "labels": [[-100, 2]], **changes}
    with pytest.raises(kind, match=words):
        attach(datasets.Dataset.from_dict(rows), str(tmp_path), **{"names": ["rank"], **options})


def test_only_a_dataset_is_taken(tmp_path):
    cache = stored(tmp_path)
    for other in (dataset().to_iterable_dataset(), datasets.DatasetDict(train=dataset())):
        with pytest.raises(OptionError, match=type(other).__name__):
            attach(other, cache)
    with pytest.raises(OptionError, match="with_transform"):
        attach(dataset().with_transform(lambda rows: rows), cache)


def test_a_cache_of_several_priors_wants_a_choice(tmp_path):
    stored(tmp_path)
    stored(tmp_path, identity=OTHER)
    stored(tmp_path, identity=replace(IDENTITY, dtype="bfloat16"))
    with pytest.raises(CacheError, match="holds 3 priors; choose one"):
        attach(dataset(), tmp_path)
    assert attach(dataset(), tmp_path, ["rank"], prior=OTHER.id)["prior_rank"][:] == expected()


def test_sequences_are_looked_up(tmp_path):
    cache = stored(tmp_path)
    found = look_up(cache, [[1, 2], np.array([5, 6, 7, 8])], names=["rank", "logprob"])
    assert [r.tolist() for r in found["rank"]] == [[0, 10], [0, 10, 11, 12]]
    np.testing.assert_array_equal(found["logprob"][0], np.array([np.nan, -10 / 8], np.float32))
    some = look_up(cache, [[5, 6, 7, 8], [3, 4, 9]], [[0, 0, 1, 0], [1, 1, 0]], ["rank"])
    assert [r.tolist() for r in some["rank"]] == [[0, 0, 11, 0], [0, 10, 0]]
    assert look_up(cache, [], names=["rank"]) == {"rank": []}
    with pytest.raises(MissingPrior, match=r"1 of 2 sequences .* \(first: sequence 1, counted"):
        look_up(cache, [[1, 2], [8, 8]])
    there = look_up(cache, [[1, 2], [8, 8]], names=["rank"], missing="nan")["rank"]
    assert [r.tolist() for r in there] == [[0, 10], [0, 0]]
    with pytest.raises(DataError, match="one entry for each token"):
        look_up(cache, [[1, 2]], [[1]])


def test_what_precompute_stored_is_what_is_attached(lab):
    """The round through a file of token ids, as the message says."""
    cache = open_prior(lab.cache)
    examples, _ = lab.spec().load(Path(lab.model), AutoConfig.from_pretrained(lab.model))
    rows = {
        "input_ids": [e.input_ids.tolist() for e in examples],
        "labels": [np.where(e.label_mask, e.input_ids, -100).tolist() for e in examples],
    }
    found = attach(datasets.Dataset.from_dict(rows), cache)["prior_logprob"]
    parts = [pq.read_table(path) for path in cache.root.parts_folder(cache.identity.id).iterdir()]
    values = {
        key: row
        for part in parts
        for key, row in zip(part["key"].to_pylist(), part["logprob"].to_pylist(), strict=True)
    }
    for example, column in zip(examples, found, strict=True):
        assert (
            np.array(column)[example.label_mask].tolist() == values[sequence_key(example.input_ids)]
        )
        assert np.isnan(np.array(column)[~example.label_mask]).all()


def test_the_package_has_what_it_names():
    for name in prift.__all__:
        assert getattr(prift, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'attached'"):
        prift.attached  # noqa: B018
