"""Command 1: what it stores, what it does not score twice, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf

from prift.cache import PriorCache, list_priors, sequence_key
from prift.errors import DataError, ModelError
from prift.request import request
from prift.stats import CORE
from tests import references
from tests.families import tiny
from tests.lab import Lab


def stored(lab: Lab, positions: str = "labels") -> dict[str, np.ndarray]:
    """Everything the cache holds for the lab's examples, joined in their order."""
    (identity,) = list_priors(lab.cache).values()
    examples, _ = lab.spec().load(lab.model, tf.AutoConfig.from_pretrained(lab.model))
    wanted = request(examples, positions)
    return PriorCache(lab.cache, identity).read(wanted.keys, wanted.spans, CORE)


def test_the_cache_holds_the_naive_statistics_of_every_label_token(tmp_path):
    lab = Lab(tmp_path, "qwen2")
    result = lab.precompute()
    assert result.scored == result.sequences == 40 and result.statistics_tokens > 100
    found = stored(lab)
    examples, _ = lab.spec().load(lab.model, tf.AutoConfig.from_pretrained(lab.model))
    model = tiny("qwen2", vocabulary=512).double()
    n = 0
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor(example.input_ids[None].astype(np.int64))).logits[0]
        for t in np.flatnonzero(example.label_mask):
            truth = references.token_stats(logits[t - 1].numpy(), int(example.input_ids[t]))
            for name in ("logprob", "entropy"):
                assert found[name][n] == pytest.approx(truth[name], abs=2e-4)
            n += 1
    assert n == len(found["rank"]) == examples.num_labels


def test_a_second_run_scores_nothing_and_loads_no_weights(tmp_path):
    lab = Lab(tmp_path)
    lab.precompute()
    before = sorted(Path(lab.cache).rglob("*"))
    lines = Path(lab.data).read_text().splitlines()
    Path(lab.data).write_text("\n".join(reversed(lines)))  # the order does not matter
    result = lab.precompute()
    assert (result.scored, result.scored_tokens) == (0, 0)
    assert sorted(Path(lab.cache).rglob("*")) == before


def test_new_data_is_added_and_old_data_is_not_scored_again(tmp_path):
    lab = Lab(tmp_path)
    assert lab.precompute(text={"limit": 25}).scored == 25
    assert lab.precompute().scored == 15


def test_equal_sequences_are_scored_once(tmp_path):
    lab = Lab(tmp_path, rows=5)
    text = Path(lab.data).read_text()
    Path(lab.data).write_text(text * 3)
    result = lab.precompute()
    assert (result.examples, result.sequences, result.scored) == (15, 5, 5)


def test_all_positions_serve_label_positions(tmp_path):
    lab = Lab(tmp_path)
    lab.precompute(positions="all")
    whole = stored(lab, "all")
    assert lab.precompute(positions="labels").scored == 0
    labels = stored(lab)
    assert 0 < len(labels["rank"]) < len(whole["rank"])
    other = Lab(tmp_path / "other")
    other.precompute()
    np.testing.assert_allclose(stored(other)["logprob"], labels["logprob"], atol=1e-5)


def test_label_positions_do_not_serve_all_positions(tmp_path):
    lab = Lab(tmp_path)
    lab.precompute()
    whole_by_label = 2  # prompts of one token: there, every position but the first is a label
    assert lab.precompute(positions="all").scored == 40 - whole_by_label


def test_each_dtype_is_a_prior_of_its_own(tmp_path):
    lab = Lab(tmp_path)
    ids = {
        lab.precompute().prior,
        lab.precompute(dtype="bfloat16").prior,
        lab.precompute(dtype="bfloat16", logits_dtype="bfloat16").prior,
        lab.precompute(attention="eager").prior,
    }
    assert len(ids) == 4 == len(list_priors(lab.cache))


def test_a_copied_model_is_the_same_prior(tmp_path):
    lab = Lab(tmp_path)
    first = lab.precompute()
    os.rename(lab.model, tmp_path / "elsewhere")
    second = lab.precompute(model=str(tmp_path / "elsewhere"))
    assert (second.prior, second.scored) == (first.prior, 0)


def test_provenance_explains_and_names_no_paths(tmp_path):
    lab = Lab(tmp_path)
    result = lab.precompute()
    (part,) = Path(result.folder, "parts").glob("*.parquet")
    metadata = pq.read_schema(part).metadata[b"prift"].decode()
    facts = json.loads(metadata)
    assert facts["model"] == "model" and facts["data"] == ["data.jsonl"]
    assert len(facts["tokenizer"]) == 64 and facts["packages"]["torch"] == version("torch")
    assert str(tmp_path) not in metadata


def test_an_id_outside_the_vocabulary_is_an_early_error(tmp_path):
    lab = Lab(tmp_path)
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 600], "labels": [-100, 600]},
    ]
    Path(lab.data).write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=r"data.jsonl:2: token id 600 .* vocabulary of 512"):
        lab.precompute()
    assert not Path(lab.cache).exists()


def test_nan_names_the_example_and_keeps_what_was_scored(tmp_path):
    lab = Lab(tmp_path)
    model = tiny("llama", vocabulary=512)
    with torch.no_grad():
        model.get_input_embeddings().weight[500] = torch.nan
    model.save_pretrained(lab.model)
    rows = [{"input_ids": [1] * n, "labels": [-100] + [1] * (n - 1)} for n in range(2, 30)]
    rows[3] = {"input_ids": [1, 500, 2], "labels": [-100, 500, 2]}
    Path(lab.data).write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ModelError, match=r"data.jsonl:4: .* NaN"):
        lab.precompute(batch_tokens=30)
    (identity,) = list_priors(lab.cache).values()
    kept = PriorCache(lab.cache, identity)
    assert 20 < len(kept) < 28
    wanted = np.array([sequence_key(np.array([1] * 29, np.int32))], "S16")
    assert kept.missing(wanted, [np.array([1, 29], np.int32)], CORE) == []


KILLED = """
import os, signal, sys
import prift_cli
from prift.store.writer import PartWriter
finish, parts = PartWriter.finish, []
def killed_behind_the_second(self):
    parts.append(finish(self))
    if len(parts) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
PartWriter.finish = killed_behind_the_second
prift_cli.main()
"""


def test_a_killed_run_continues(tmp_path):
    """kill -9 as the second part is visible: whole parts stay, the next run scores the rest."""
    lab = Lab(tmp_path, rows=400)
    words = ["precompute", "--model", lab.model, "--data", lab.data, "--cache", lab.cache]
    words += ["--max-length", "60", "--batch-tokens", "60", "--part-seconds", "0"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    result = lab.precompute()
    assert 0 < result.scored < result.sequences
    assert lab.precompute().scored == 0
    whole = Lab(tmp_path / "whole", rows=400)
    whole.precompute()
    for name in ("logprob", "entropy"):
        np.testing.assert_allclose(stored(lab)[name], stored(whole)[name], atol=1e-5)


def test_the_padding_side_of_a_tokenizer_changes_no_bit(tmp_path):
    found = []
    for side in ("left", "right"):
        lab = Lab(tmp_path / side)
        tokenizer = tf.AutoTokenizer.from_pretrained(lab.model)
        tokenizer.padding_side = side
        tokenizer.save_pretrained(lab.model)
        lab.precompute()
        found.append(stored(lab))
    for name in CORE:
        assert np.array_equal(found[0][name], found[1][name])


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    """transformers would load it silently, and the identity would not say so."""
    lab = Lab(tmp_path)
    Path(lab.model, "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        lab.precompute()


def test_the_files_that_are_hashed_are_those_that_are_loaded(tmp_path):
    """A single file wins over shards, as in transformers; a broken index is an error."""
    lab = Lab(tmp_path)
    plain = lab.precompute().prior
    index = Path(lab.model, "model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"x": "other.safetensors"}}))
    assert lab.precompute().prior == plain
    Path(lab.model, "model.safetensors").rename(tmp_path / "away")
    for broken in ("{", "{}", "[]"):
        index.write_text(broken)
        with pytest.raises(ModelError, match="not an index of weights"):
            lab.precompute()


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": 5, "labels": [5]},
        {"input_ids": [[1, 2]], "labels": [[1, 2]]},
        {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [[1, 1]]},
        {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": 1},
        {"input_ids": [1, 2], "labels": [-100, 2], "position_ids": 3},
    ],
)
def test_ids_that_are_no_flat_list_are_named(tmp_path, row):
    lab = Lab(tmp_path)
    Path(lab.data).write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"data.jsonl:1: .* where a list of whole numbers"):
        lab.precompute()


def test_a_bottomless_line_is_named(tmp_path):
    lab = Lab(tmp_path)
    Path(lab.data).write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(DataError, match="data.jsonl:1 is not JSON"):
        lab.precompute()


def test_half_the_room_by_storage_float16(tmp_path):
    lab = Lab(tmp_path, rows=40)
    lab.precompute(storage="float16")
    half = stored(lab)
    whole = Lab(tmp_path / "whole", rows=40)
    whole.precompute()
    for name, values in stored(whole).items():
        kind = np.float16 if values.dtype == np.float32 else values.dtype
        assert np.array_equal(half[name], values.astype(kind).astype(values.dtype)), name


def test_who_reads_rows_in_half_precision_is_told(tmp_path):
    """A later run with --storage float32 scores none of them anew."""
    from prift.export import ExportOptions, export
    from prift.methods import METHODS, weigher

    lab = Lab(tmp_path, rows=40)
    chosen = weigher(*METHODS["prift-mass"], {}, allow_negative=True)
    options = ExportOptions(lab.model, lab.cache, lab.spec(), chosen, str(tmp_path / "w.parquet"))

    def told(read) -> list[str]:
        said = []
        read(said)
        return [line for line in said if "half precision" in line]

    lab.precompute(text={"limit": 25}, storage="float16")
    assert lab.precompute().scored == 15
    (line,) = told(lambda said: export(options, said.append))
    assert line.startswith("25 of 40 sequences are stored in half precision")
    flags = "--max_steps 1"
    assert told(lambda said: lab.train("out", "prift-mass", flags, said=said)) == [line]
    whole = Lab(tmp_path / "whole", rows=40)
    whole.precompute()
    options = ExportOptions(
        whole.model, whole.cache, whole.spec(), chosen, str(tmp_path / "w.parquet")
    )
    assert told(lambda said: export(options, said.append)) == []
