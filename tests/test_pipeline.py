"""Precompute window by window, with a thread that reads ahead and one that writes: the same cache
as in one window, and what is said on the way. test_pipeline_ends.py has what goes wrong."""

import re
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import transformers as tf

from prift.cache import PriorCache, list_priors
from prift.precompute import PrecomputeOptions, precompute
from prift.request import request
from prift.stats import CORE
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from tests.lab import Lab


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = {t for t in threading.enumerate() if t.name.startswith("prift")}
    assert left <= before


def rows_of(lab: Lab, cache: str | None = None) -> int:
    (identity,) = list_priors(cache or lab.cache).values()
    return len(PriorCache(cache or lab.cache, identity))


def stored(lab: Lab, text: dict | None = None) -> dict[str, np.ndarray]:
    (identity,) = list_priors(lab.cache).values()
    config = tf.AutoConfig.from_pretrained(lab.model)
    examples, _ = lab.spec(**text or {}).load(lab.model, config)
    wanted = request(examples)
    return PriorCache(lab.cache, identity).read(wanted.keys, wanted.spans, CORE)


def said_by(lab: Lab, rows: int, **spec) -> list[str]:
    said: list[str] = []
    whole = {"data": (lab.data,), "text": TextOptions(max_length=60), **spec}
    options = PrecomputeOptions(window_rows=rows)
    precompute(lab.model, DataSpec(**whole), lab.cache, options, said.append)
    return said


@pytest.mark.parametrize("rows", [1, 7, 39, 40, 41])
def test_windows_give_the_cache_of_one(tmp_path, rows):
    one, many = Lab(tmp_path / "one"), Lab(tmp_path / "many")
    whole, result = one.precompute(), many.precompute(window_rows=rows)
    for name in ("examples", "sequences", "scored", "scored_tokens", "statistics_tokens"):
        assert getattr(result, name) == getattr(whole, name)
    assert rows_of(many) == rows_of(one) == 40
    expected, found = stored(one), stored(many)
    for name in ("logprob", "entropy"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    assert many.precompute(window_rows=rows).scored == 0
    assert many.precompute().scored == 0


def test_the_same_windows_give_the_same_bits(tmp_path):
    labs = [Lab(tmp_path / name) for name in "ab"]
    for lab in labs:
        lab.precompute(window_rows=7)
    for name in CORE:
        assert np.array_equal(stored(labs[0])[name], stored(labs[1])[name])


def test_a_continued_run_scores_what_later_windows_lack(tmp_path):
    lab = Lab(tmp_path)
    lab.precompute(text={"limit": 18})
    result = lab.precompute(window_rows=5)
    assert (result.sequences, result.scored) == (40, 22)


def test_equal_sequences_of_different_windows_are_scored_once(tmp_path):
    lab = Lab(tmp_path, rows=5)
    Path(lab.data).write_text(Path(lab.data).read_text() * 4)
    result = lab.precompute(window_rows=3)
    assert (result.examples, result.sequences, result.scored) == (20, 5, 5)
    assert rows_of(lab) == 5


def test_thinned_data_are_what_training_will_read(tmp_path):
    lab = Lab(tmp_path)
    spec = DataSpec(data=(lab.data, lab.data), weights=(0.25, 0.5), text=TextOptions(seed=1))
    options = PrecomputeOptions(window_rows=4)
    result = precompute(lab.model, spec, lab.cache, options, lambda line: None)
    examples, _ = spec.load(lab.model, tf.AutoConfig.from_pretrained(lab.model))
    wanted = request(examples)
    (identity,) = list_priors(lab.cache).values()
    assert PriorCache(lab.cache, identity).missing(wanted.keys, wanted.spans, CORE) == []
    assert result.examples == len(examples) == 30
    assert result.scored == len(np.unique(wanted.keys)) < 30


def test_one_window_is_told_beforehand(tmp_path):
    lab = Lab(tmp_path)
    said = said_by(lab, 41)
    assert said[:1] == [f"{lab.data}: format prompt-response, plain"]
    assert re.fullmatch(r"40 rows -> 40 examples, .* labels", said[1])
    told = [line for line in said if line.startswith("prior")]
    assert re.fullmatch(
        "prior [0-9a-f]{16}: 40 distinct sequences, 0 in the cache, 40 to score", *told
    )
    again = said_by(lab, 41)
    assert again[:2] == said[:2]
    assert again[2].endswith(": 40 distinct sequences, 40 in the cache, 0 to score")


@pytest.mark.parametrize("rows", [7, 20])
def test_several_windows_are_summed_up_once_all_is_read(tmp_path, rows):
    lab, other = Lab(tmp_path), tmp_path / "other.jsonl"
    other.write_text('{"question": "go", "answer": "fast"}\n' * 20)
    data = {"data": (lab.data, str(other))}
    said = said_by(lab, rows, **data)
    formats = [f"{lab.data}: format prompt-response, plain"]
    formats += [f"{other}: format question-answer, plain"]
    assert said[0] == formats[0]
    assert [line for line in said if "format" in line] == formats
    begun = next(i for i, line in enumerate(said) if "scored while the rest" in line)
    totals = next(i for i, line in enumerate(said) if line.startswith("60 rows -> 60 examples, "))
    assert 0 < begun < totals < len(said) - 1
    assert said[-1].endswith(": 41 distinct sequences, 0 in the cache, 41 to score")
    again = said_by(lab, rows, **data)
    assert [line for line in again if "scored while the rest" in line] == []
    assert again[-1].endswith(": 41 distinct sequences, 41 in the cache, 0 to score")


def test_windows_are_let_go(tmp_path):
    """One is scored, one waits, one is made; and each loop may still hold its last."""
    alive, known = [], []

    class Watched(DataSpec):
        def windows(self, *args):
            for window in super().windows(*args):
                known.append(weakref.ref(window.examples))
                alive.append(sum(ref() is not None for ref in known))
                yield window

    lab = Lab(tmp_path, rows=400)
    options = PrecomputeOptions(window_rows=10)
    precompute(lab.model, Watched((lab.data,)), lab.cache, options, lambda line: None)
    assert len(alive) == 40 and max(alive) <= 6
