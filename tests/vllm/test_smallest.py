"""One engine with prift's defaults, which is what CI starts: a tied Llama in float32."""

import numpy as np
import pytest

from prift.backends import TooLong
from prift.stats import CORE, EXTENDED
from tests.vllm import models
from tests.vllm.parity import check_parity
from tests.vllm.scorers import scorer, scores

LENGTHS = [1, 2, 3, 17, 40, 40, 100, models.CONTEXT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.make(tmp_path_factory.mktemp("llama"), "llama", tied=True)


@pytest.fixture(scope="module")
def sequences(folder):
    return models.sequences(folder, LENGTHS)


@pytest.fixture(scope="module")
def hf(folder):
    with scorer(folder) as started:
        yield started


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def vllm(folder, said):
    with scorer(folder, said, backend="vllm") as started:
        yield started


def test_every_statistic_is_that_of_transformers(vllm, hf, folder, sequences, said):
    assert vllm.exact and any("statistics from its workers" in line for line in said)
    check_parity(vllm, hf, folder, sequences)


def test_some_positions_are_those_of_all(vllm, sequences):
    """What follows the last of them is not run, which changes nothing that comes before."""
    whole = scores(vllm, sequences)
    some = [np.arange(1, len(ids))[1::3][: len(ids) // 2] for ids in sequences]
    assert sum(map(len, some)) > 50 and not len(some[0])
    for ids, where, few, all_ in zip(
        sequences, some, scores(vllm, sequences, some), whole, strict=True
    ):
        assert len(few["rank"]) == len(where), len(ids)
        for name in ("logprob", "entropy"):
            np.testing.assert_allclose(few[name], all_[name][where - 1], atol=2e-5)


def test_extended_statistics(vllm, hf, sequences):
    names, sequences = CORE + EXTENDED, sequences[1:]
    for one, other in zip(
        scores(vllm, sequences, names=names), scores(hf, sequences, names=names), strict=True
    ):
        assert sorted(one) == sorted(names)
        for name, room in [("collision", 1e-5), ("expected_rank", 1e-3), ("entropy_top20", 1e-4)]:
            np.testing.assert_allclose(one[name], other[name], rtol=room, atol=room, err_msg=name)


def test_a_sequence_that_is_too_long_is_told_before_anything_runs(vllm, sequences):
    long = np.ones(models.CONTEXT + 1, np.int32)
    with pytest.raises(TooLong) as told:
        next(iter(vllm.score([sequences[3], long], [np.array([1]), np.array([len(long) - 1])])))
    assert (told.value.index, told.value.most) == (1, models.CONTEXT)
    # Its last tokens alone are too many: positions before them are scored.
    assert len(scores(vllm, [long], [np.array([5])])[0]["rank"]) == 1
