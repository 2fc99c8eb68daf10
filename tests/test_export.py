"""`prift cache export`: a data set's tokens with a rule's weights, for other trainers."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig

from prift import export as export_module
from prift.cache import PriorCache, list_priors
from prift.choice import open_prior
from prift.columns import look_up
from prift.errors import CacheError, MissingPrior, OptionError, PriftError
from prift.export import ExportOptions, export
from prift.methods import weigher
from prift.request import request
from tests import cli_fixtures as cli
from tests.lab import Lab


def run(lab, output, rule="mass", arguments=None, source="prior", **options):
    chosen = weigher(rule, source, arguments or {})
    given = ExportOptions(
        lab.model, lab.cache, lab.spec(), chosen, str(output), **options
    )  # fmt: skip
    return export(given, lambda line: None)


def naive(lab, rule: str, name: str) -> list[dict[str, np.ndarray]]:
    """Each example's ids, labels, weights and one statistic, from the cache's rows one by one."""
    (identity,) = list_priors(lab.cache).values()
    cache = PriorCache(lab.cache, identity)
    examples, _ = lab.spec().load(Path(lab.model), AutoConfig.from_pretrained(lab.model))
    asked = request(examples)
    rows = []
    for i, example in enumerate(examples):
        names = ["logprob", "log_mass_rank", "n_tie", name]
        found = cache.read(asked.keys[i : i + 1], asked.spans[i : i + 1], names)
        row = {"input_ids": example.input_ids, "labels": np.full(len(example.input_ids), -100)}
        row["labels"][example.label_mask] = example.input_ids[example.label_mask]
        row["weights"] = np.zeros(len(example.input_ids), np.float32)
        row[name] = np.full(len(example.input_ids), np.nan, np.float32)
        row["weights"][example.label_mask] = (
            np.exp(found["logprob"])
            if rule == "prob"
            else (found["log_mass_rank"] >= np.float32(np.log(0.5)))
        )
        row[name][example.label_mask] = found[name]
        rows.append(row)
    return rows


def check(found: list[dict], wanted: list[dict], name: str) -> None:
    assert len(found) == len(wanted)
    for row, right in zip(found, wanted, strict=True):
        assert list(row) == ["input_ids", "labels", "weights", name]
        assert row["input_ids"] == right["input_ids"].tolist()
        assert row["labels"] == right["labels"].tolist()
        np.testing.assert_allclose(row["weights"], right["weights"], rtol=3e-7, atol=0)
        values = [np.nan if v is None else v for v in row[name]]
        np.testing.assert_array_equal(np.array(values, np.float32), right[name])


@pytest.mark.parametrize("rule", ["prob", "mass"])
def test_parquet_holds_what_the_cache_and_the_rule_give(lab, tmp_path, rule, monkeypatch):
    monkeypatch.setattr(export_module, "_ROWS", 7)  # of forty: several row groups, the last short
    result = run(lab, tmp_path / "new" / "w.parquet", rule, statistics=("entropy",))
    table = pq.read_table(result.output)
    assert [f"{f.name} {f.type.value_type}" for f in table.schema] == [
        "input_ids int32", "labels int32", "weights float", "entropy float",
    ]  # fmt: skip
    wanted = naive(lab, rule, "entropy")
    check(table.to_pylist(), wanted, "entropy")
    (prior,) = list_priors(lab.cache)
    facts = json.loads(table.schema.metadata[b"prift"])
    assert (facts["prior"], facts["rule"]) == (prior, rule) and result.prior == prior
    weights = np.concatenate([w["weights"][w["labels"] >= 0] for w in wanted])
    assert result.label_tokens == len(weights) and result.examples == len(wanted)
    assert result.mean_weight == pytest.approx(weights.mean(dtype=np.float64), rel=1e-6)
    assert result.zero_share == (weights == 0).mean()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["w.parquet"]


def test_jsonl_holds_the_same_and_is_json(lab, tmp_path):
    run(lab, tmp_path / "w.jsonl", "prob", statistics=("logprob",))
    text = (tmp_path / "w.jsonl").read_text()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    check(rows, naive(lab, "prob", "logprob"), "logprob")
    read = datasets.load_dataset(
        "json", data_files=str(tmp_path / "w.jsonl"), split="train", cache_dir=str(tmp_path / "d")
    )
    for row, right in zip(read["weights"], rows, strict=True):
        np.testing.assert_allclose(row, right["weights"], rtol=0, atol=1e-14)  # its reader's digits


def test_infinity_is_the_lowest_float32_in_json():
    row = {"input_ids": [1], "logprob": [-np.inf, np.nan, -1.5], "rank": [0, 3]}
    assert export_module._finite(row) == {
        "input_ids": [1],
        "logprob": [float(np.finfo(np.float32).min), None, -1.5],
        "rank": [0, 3],
    }


def test_a_file_of_that_name_is_replaced_whole(lab, tmp_path):
    place = tmp_path / "w.jsonl"
    run(lab, place, "prob")
    first = place.read_bytes()
    run(lab, place, "mass")
    assert place.read_bytes() != first and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["w.parquet", "w.jsonl"])
def test_a_full_disk_leaves_what_was_there(lab, tmp_path, name):
    """In a process of its own in which no file can grow over a thousand bytes."""
    place = tmp_path / name
    place.write_text("before")
    words = ["prift", "cache", "export", "--model", lab.model, "--data", lab.data]
    words += ["--max-length", "60", "--cache", lab.cache, "--method", "prift-prob"]
    done = cli.shell([*words, "--output", place], room=1000)
    assert done.returncode == 1, done.stderr
    assert f"Error: cannot write {place}: File too large. Nothing was left there" in done.stderr
    assert place.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_exported_is_refused(lab, tmp_path):
    for options, kind, words in [
        ({"output": tmp_path / "w.csv"}, OptionError, "ends in .parquet or .jsonl"),
        ({"rule": "prob", "source": "online"}, OptionError, "only weights from the prior"),
        ({"statistics": ("ranks",)}, OptionError, "--column ranks: no such statistic"),
        ({"prior": "0123456789abcdef"}, CacheError, "holds no prior 0123456789abcdef"),
        ({"statistics": ("collision",)}, MissingPrior, "prift precompute --model"),
    ]:
        with pytest.raises(kind, match=words):
            run(lab, **{"output": tmp_path / "w.parquet", **options})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(PriftError, match="cannot write"):
        run(lab, tmp_path / "file" / "w.parquet")


def test_data_that_were_not_scored_are_refused_with_the_command(tmp_path):
    lab = Lab(tmp_path, rows=5)
    lab.precompute(text={"limit": 2})
    with pytest.raises(
        MissingPrior, match=r"3 of 5 sequences have no prior .*\n  prift precompute"
    ):
        run(lab, tmp_path / "w.parquet")


def test_the_command(lab, tmp_path):
    data = ["--model", lab.model, "--data", lab.data, "--max-length", "60", "--cache", lab.cache]
    method = ["--method", "prift-mass", "--rule-arg", "threshold=0.25"]
    out = tmp_path / "w.parquet"
    shown = cli.prift("cache", "export", *data, *method, "--output", out, "--json")
    result = json.loads(cli.succeeded(shown).splitlines()[-1])
    assert result["output"] == str(out) and result["examples"] == pq.read_table(out).num_rows
    plain = cli.prift("cache", "export", *data, "--rule", "uniform", "--output", out)
    assert f"mean 1.0000, 0.0% zero\n{out}" in cli.succeeded(plain)
    cli.refused(cli.prift("cache", "export", *data, "--output", out), "--method NAME, or --rule")
    online = [*data, "--method", "dft", "--output", out]
    cli.refused(cli.prift("cache", "export", *online), "only weights from the prior")


def test_a_cache_at_a_url_serves_export_columns_and_training(lab, s3, tmp_path):
    """All readers of this house, from the same priors as in the folder."""
    for file in Path(lab.cache).rglob("*"):
        if file.is_file():
            s3.put(f"team/{file.relative_to(lab.cache)}", file.read_bytes())
    url = s3.url("team")
    words = ["prift", "cache", "export", "--model", lab.model, "--data", lab.data]
    words += ["--max-length", "60", "--method", "prift-prob", "--cache"]
    for cache in (lab.cache, url):
        out = tmp_path / f"{len(cache)}.jsonl"
        cli.succeeded(cli.prift(*words[1:], cache, "--output", out))
    one, other = (path.read_bytes() for path in tmp_path.glob("*.jsonl"))
    assert one == other
    ids = [json.loads(line)["input_ids"] for line in one.splitlines()]
    scored = [np.array(json.loads(line)["labels"]) >= 0 for line in one.splitlines()]
    found = look_up(open_prior(url, lab.model), ids, scored)["logprob"]
    right = look_up(open_prior(lab.cache), ids, scored)["logprob"]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, right, strict=True))
    with pytest.raises(
        CacheError, match=f"^{re.escape(url.partition('?')[0])} holds no prior 0{{16}}"
    ):
        open_prior(url, "0" * 16)
    said = []
    for name, cache in (("folder", lab.cache), ("url", url)):
        lab.train(f"from-{name}", "prift-mass", "--max_steps 2", said=said, cache=cache)
    assert sum("the model agrees with the prior" in line for line in said) == 2
    losses = [
        [entry["loss"] for entry in lab.history(f"from-{name}") if "loss" in entry]
        for name in ("folder", "url")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
