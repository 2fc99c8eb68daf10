"""What a Ray worker answers, without Ray: tables in, tables out, errors behind what was done."""

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from prift.backends import BadLogits, TooLarge, hf
from prift.backends.ray_worker import Job, Worker, results, sequences_table
from prift.errors import ModelError, OptionError
from prift.models import load_config
from prift.precompute import PrecomputeOptions, precompute
from prift.stats import CORE
from tests.families import save
from tests.lab import Lab

SEQUENCES = [np.arange(n, 2 * n + 1, dtype=np.int32) for n in range(2, 12)]
POSITIONS = [np.array([1, len(s) - 1]) for s in SEQUENCES]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save("llama", folder, vocabulary=64)
    return folder


def job(folder: Path, **changes) -> Job:
    how = {"dtype": "float32", "logits_dtype": "float32", "attention": "auto"}
    identity = hf.identify(folder, load_config(folder), **how)
    return replace(Job(str(folder), identity, CORE, gpus=0), **changes)


def asked(chosen: range) -> object:
    of = ([SEQUENCES[i] for i in chosen], [POSITIONS[i] for i in chosen])
    return sequences_table(list(chosen), *of)


def answers(worker: Worker, chosen: range) -> tuple[dict, list[str], Exception | None]:
    """Statistics by index, the lines said, and the error that came behind them."""
    stats, said = {}, []
    try:
        for answer in results(worker(asked(chosen)), CORE):
            if isinstance(answer, str):
                said.append(answer)
            else:
                stats[answer[0]] = answer[1]
    except (BadLogits, TooLarge, ModelError) as error:
        return stats, said, error
    return stats, said, None


def test_it_answers_to_the_bit_what_the_scorer_does(model):
    given = job(model)
    scorer = hf.load(model, load_config(model), given.identity, say=lambda line: None)
    chosen = range(3, 9)
    of = ([SEQUENCES[i] for i in chosen], [POSITIONS[i] for i in chosen])
    expected = {chosen[i]: stats for i, stats in scorer.score(*of)}
    found, said, error = answers(Worker(given), chosen)
    assert error is None and sorted(found) == list(chosen)
    assert said == ["statistics: not compiled, since the data are few"]
    for i in chosen:
        for name in CORE:
            assert torch.equal(getattr(found[i], name), getattr(expected[i], name))


def test_lines_come_once_and_a_successor_says_that_it_is_one(model):
    worker = Worker(job(model), successor=True)
    first, second = answers(worker, range(2))[1], answers(worker, range(2, 4))[1]
    assert first[0] == f"a Ray worker died on {socket.gethostname()}; Ray has started another"
    assert len(first) == 2 and second == []


def test_bad_logits_name_the_sequence_and_cost_no_other(model, tmp_path):
    broken = tf.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[3] = torch.nan  # in the first two sequences alone
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    broken.save_pretrained(tmp_path)
    found, _, error = answers(Worker(job(tmp_path, batch_tokens=1)), range(1, 10))
    assert isinstance(error, BadLogits) and (error.index, error.position) == (1, 1)
    assert sorted(found) == list(range(2, 10))


def test_another_model_is_refused_by_name(model, tmp_path):
    other = tmp_path / "other"
    save("llama", other, vocabulary=64, seed=1)
    found, _, error = answers(Worker(job(model, model=str(other))), range(2))
    assert isinstance(error, ModelError) and not found
    assert f"--model {other} is not the same on {socket.gethostname()}" in str(error)
    assert "differing: weights" in str(error)


def test_a_model_that_is_not_there_is_refused_at_each_call(model):
    worker = Worker(job(model, model="/absent/model"))
    for chosen in (range(2), range(2, 4)):
        found, _, error = answers(worker, chosen)
        assert isinstance(error, ModelError) and "no such folder" in str(error) and not found


def test_a_sequence_too_large_is_named(model):
    worker = Worker(job(model))

    def too_large(*_):
        raise TooLarge(1)

    worker._scorer.score = too_large  # no memory is small enough for this model
    error = answers(worker, range(5, 8))[2]
    assert isinstance(error, TooLarge) and error.index == 6


def test_without_ray_the_engine_is_refused_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    lab = Lab(tmp_path, rows=2)
    Path(lab.data).write_text("not read")
    with pytest.raises(OptionError, match=r"--engine ray needs Ray Data .* 'prift\[ray\]'"):
        lab.precompute(engine="ray")


@pytest.mark.parametrize("option", [{"ray_workers": 2}, {"ray_gpus": 0}])
def test_rays_options_without_ray_are_refused(tmp_path, option):
    lab = Lab(tmp_path, rows=2)
    with pytest.raises(OptionError, match="--engine ray"):
        precompute(lab.model, lab.spec(), lab.cache, PrecomputeOptions(**option))
