"""`--vllm-mode`: the self-test on an engine whose insides have moved, and what bounds give.

One engine, whose workers' extension can be told what has moved; the scorer over it is made anew
for each.
"""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from prift.backends import TooLong, vllm_options
from prift.backends import vllm as backend
from prift.backends.vllm_worker import columns_for
from prift.errors import ModelError
from prift.models import load_config
from prift.stats import CORE
from tests.vllm import brackets, models
from tests.vllm.moved import MOVES
from tests.vllm.scorers import scorer, scores

LENGTHS = [2, 30, 31, 60, 61, 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.make(tmp_path_factory.mktemp("llama"), "llama", tied=True)


@pytest.fixture(scope="module")
def sequences(folder):
    return models.sequences(folder, LENGTHS)


@pytest.fixture(scope="module")
def engine(folder):
    """(the engine, the identity of what it runs)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_options, "EXTENSION", "tests.vllm.moved.Moved")
        with scorer(folder, backend="vllm") as started:
            assert started.exact
            yield started._engine, started.identity


class Kept:
    """The engine, which scorers do not end."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def close(self):
        """The fixture does it."""


@pytest.fixture
def scorer_over(engine, folder):
    """(moved, mode, arguments of the engine) -> a scorer, and what it said."""
    started, identity = engine

    def make(moved: str | None, mode: str, **arguments):
        said = []
        started.call("prift_remove")
        started.call("prift_move", moved)
        options = vllm_options.VLLMOptions(mode=mode, engine_args=arguments)
        config = load_config(Path(folder))
        found = backend.check_installed(options)
        exact = mode != "bounds"
        made = backend.VLLMScorer(
            lambda: Kept(started), config, identity, options, found, exact, None, said.append
        )
        return made, said

    yield make
    with contextlib.suppress(ModelError):
        started.call("prift_remove")


ROUNDED = "logits are rounded"


@pytest.mark.parametrize("mode", ["exact", "auto"])
def test_a_head_that_rounds_is_refused(scorer_over, mode):
    """Bounds would store what it rounds as well."""
    with pytest.raises(ModelError, match="logits are bfloat16, and float32 is asked for"):
        scorer_over(ROUNDED, mode)


@pytest.mark.parametrize("moved", [name for name in MOVES if name != ROUNDED])
def test_what_has_moved_is_found(scorer_over, moved):
    with pytest.raises(
        ModelError, match=r"--vllm-mode exact does not work with .* in the self-test"
    ):
        scorer_over(moved, "exact")
    made, said = scorer_over(moved, "auto")
    assert not made.exact
    assert any("no statistics from its workers: in the self-test" in line for line in said)


def test_after_a_failed_self_test_the_workers_are_as_they_were(scorer_over, sequences, folder):
    """What asked for statistics gets vLLM's own most probable tokens again."""
    made, _ = scorer_over("logits are halved", "auto")
    ids = sequences[5]
    K = columns_for(CORE)
    ((listed, columns, _),) = made._engine.ask([ids.tolist()], K)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None]).long()).logits[0, :-1]
    top = logits.log_softmax(1).topk(K + 1)
    apart = ((top.values[:, :-1] - top.values[:, 1:]) > 1e-3).all(1).numpy()
    assert apart.sum() > 50
    assert (listed[apart, 1:] == top.indices[:, :K].numpy()[apart]).all()
    assert np.abs(columns[:, 1:] - top.values[:, :K].numpy()).max() < brackets.CLOSE
    stored, _ = check_bounds(made, [ids[:n] for ids in sequences for n in (2, 3)], folder)
    assert stored > 0


def test_what_has_not_moved_passes(scorer_over):
    for mode in ("exact", "auto"):
        made, said = scorer_over(None, mode)
        assert made.exact and not any("no statistics" in line for line in said)


def check_bounds(made, sequences, folder) -> tuple[int, int]:
    """(stored, left out): of what is stored every number is right, and entropy is not there."""
    found = scores(made, sequences)
    stored = 0
    for stats, allowed in zip(found, brackets.of_model(folder, sequences), strict=True):
        if not stats:
            continue
        stored += 1
        assert sorted(stats) == ["log_mass_rank", "logprob", "n_tie", "rank"]
        assert np.abs(stats["logprob"] - allowed.logprob).max() <= brackets.CLOSE
        rank, log_u = stats["rank"], stats["log_mass_rank"]
        assert ((allowed.rank_least <= rank) & (rank <= allowed.rank_most)).all()
        room = 1e-5 + brackets.CLOSE
        assert (allowed.mass_least - room <= log_u).all() and (
            log_u <= allowed.mass_most + room
        ).all()
        assert ((rank == 1) == (log_u == 0)).all()
    return stored, len(found) - stored


def test_bounds_store_what_they_know_and_nothing_else(scorer_over, sequences, folder):
    """Likely tokens are known, tokens drawn at random are not, so their sequences are left out."""
    made, said = scorer_over(None, "bounds")
    assert any("Its 100 most probable tokens must do" in line for line in said)
    stored, left = check_bounds(made, sequences, folder)
    assert left >= 3
    single = [ids[:n] for ids in sequences for n in (2, 3)]
    stored_short, left_short = check_bounds(made, single, folder)
    assert stored + stored_short > 0 and left_short > 0


def test_positions_alone_decide_what_is_left_out(scorer_over, sequences, folder):
    made, _ = scorer_over(None, "bounds")
    ids = sequences[5]
    (truth,) = brackets.of_model(folder, [ids])
    likely = np.flatnonzero(truth.mass_least > np.log(0.35)) + 1
    assert 20 < len(likely) < len(ids) - 1
    (stats,) = scores(made, [ids], [likely])
    assert len(stats["rank"]) == len(likely)


def test_no_sequence_is_longer_than_the_model_is_made_for(scorer_over):
    """Whatever --engine-arg max_model_len lets the engine take."""
    made, _ = scorer_over(None, "bounds")
    made._engine.longest = 10_000
    long = np.ones(models.CONTEXT + 1, np.int32)
    with pytest.raises(TooLong) as told:
        next(iter(made.score([long], [np.array([models.CONTEXT])])))
    assert told.value.most == models.CONTEXT
