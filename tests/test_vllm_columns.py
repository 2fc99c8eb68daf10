"""What vLLM's workers send back: packed as in a worker, unpacked as in the front end, against the
naive float64 definition; and the two functions that are exchanged, driven as vLLM calls them."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from prift.backends.vllm_worker import Statistics, _sums, columns_for, is_ours, pack, unpack
from prift.stats import CORE, EXTENDED, tile_sums
from tests import references

ALL = CORE + EXTENDED


class Answer(NamedTuple):
    """The fields of vLLM's own class that are always there."""

    logprob_token_ids: torch.Tensor
    logprobs: torch.Tensor
    selected_token_ranks: torch.Tensor


def drawn(rows: int, V: int, seed: int = 0, scale: float = 3.0):
    """(logits [rows, V], targets [rows]): half of the targets are likely, and some are tied."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, V, generator=generator) * scale
    targets = torch.randint(0, V, (rows,), generator=generator)
    targets[::2] = torch.multinomial(logits[::2].softmax(1), 1, generator=generator)[:, 0]
    for row in range(0, rows, 5):
        logits[row, (int(targets[row]) + 1) % V] = logits[row, targets[row]]
    return logits, targets


def back(answer, names):
    """As `unpack` has it of what a request answers: Python floats, made arrays of float64."""
    _, columns, ranks = answer
    return unpack(np.array(columns.tolist()), np.array(ranks.tolist()), names)


def compare(stats, logits, targets, names) -> None:
    """No further from float64 than the obvious float32 code, plus 1e-5 relative."""
    for i, target in enumerate(targets.tolist()):
        row = logits[i].float().numpy()
        truth, naive = references.token_stats(row, target), references.naive_float32(row, target)
        for name in names:
            found = float(getattr(stats, name)[i])
            if name in ("rank", "n_tie"):
                assert found == truth[name], (name, i)
                continue
            budget = abs(naive[name] - truth[name]) + 1e-5 * max(1, abs(truth[name]))
            assert abs(found - truth[name]) <= budget, (name, i)


@pytest.mark.parametrize("names", [CORE, ALL], ids=["core", "extended"])
@pytest.mark.parametrize("V", [7, 300, 20_000])
def test_there_and_back(names, V):
    logits, targets = drawn(20, V)
    answer = pack(logits, targets, columns_for(names))
    stats = back(answer, names)
    assert stats.names() == tuple(names)
    assert stats.rank.dtype == stats.n_tie.dtype == torch.int32
    compare(stats, logits, targets, names)


def test_ranks_and_ties_are_exact_in_a_vocabulary_of_hundreds_of_thousands():
    V = 300_001
    logits = torch.zeros(2, V)
    logits[1] = torch.arange(V)
    stats = back(pack(logits, torch.tensor([5, 0]), columns_for(CORE)), CORE)
    assert stats.rank.tolist() == [1, V] and stats.n_tie.tolist() == [V, 1]


def test_chunks_of_rows_change_nothing():
    logits, targets = drawn(300, 100)
    whole = pack(logits, targets, 3)
    chunks = [pack(logits[i : i + 70], targets[i : i + 70], 3) for i in range(0, 300, 70)]
    for one, others in zip(whole, zip(*chunks, strict=True), strict=True):
        assert torch.equal(one, torch.cat(others))


def test_rows_that_are_no_distribution_are_told_and_no_other():
    logits, targets = drawn(6, 40)
    logits[1, 3], logits[2, 3], logits[4] = torch.nan, torch.inf, -torch.inf
    stats = back(pack(logits, targets, 3), CORE)
    assert stats.logprob.isnan().tolist() == [False, True, True, False, True, False]


def test_a_token_without_probability():
    logits, targets = drawn(1, 40)
    logits[0, targets] = -torch.inf
    stats = back(pack(logits, targets, 3), CORE)
    assert stats.logprob.item() == stats.log_mass_rank.item() == -torch.inf
    assert stats.rank.item() == 40


def test_rounded_logits_are_those_of_bfloat16():
    logits, targets = drawn(40, 3000)
    stats = back(pack(logits, targets, 3, rounded=True), CORE)
    compare(stats, logits.bfloat16(), targets, CORE)
    assert (stats.n_tie > 1).sum() > 10  # what rounding ties


def test_ids_say_that_the_columns_are_ours():
    logits, targets = drawn(4, 5)
    ids, columns, _ = pack(logits, targets, 6)
    assert ids.dtype == torch.int32 and columns.dtype == torch.float32
    assert ids.tolist() == [[t, 0, 1, 2, 3, 4, 4] for t in targets.tolist()]  # ids of the 5


def test_the_v1_function_answers_for_its_columns_and_leaves_others_to_vllm():
    logits, targets = drawn(10, 50)
    asked = []

    def own(logprobs, K, ids):
        asked.append((logprobs, K, ids))
        return "vLLM's"

    statistics = Statistics(Answer, rounded=False)
    gather = statistics.gather(own, lambda z: z.log_softmax(1))
    answer = gather(logits, columns_for(CORE), targets)
    assert isinstance(answer, Answer) and not asked and statistics.dtypes == {"float32"}
    compare(back(answer, CORE), logits, targets, CORE)
    assert gather(logits, 20, targets) == "vLLM's"
    assert torch.equal(asked[0][0], logits.log_softmax(1)) and asked[0][1] == 20


def test_the_v2_function_takes_chunks_and_whatever_else_it_is_called_with():
    logits, targets = drawn(25, 50)
    asked = []
    statistics = Statistics(Answer, rounded=False)
    scores = statistics.scores(lambda *a, **k: asked.append((a, k)))
    K = columns_for(ALL)
    chunks = [
        scores(logits[i : i + 10], K, targets[i : i + 10], logits_mode=False)
        for i in range(0, 25, 10)
    ]
    joined = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    compare(back(joined, ALL), logits, targets, ALL)
    scores(logits, 1, targets, logits_mode=True)
    assert statistics.dtypes == {"float32"}
    scores(logits.bfloat16(), K, targets)
    assert statistics.dtypes == {"float32", "bfloat16"}
    assert asked[0][0][1] == 1 and asked[0][1] == {"logits_mode": True}


def test_what_vllm_asks_itself_is_never_taken_for_ours():
    assert [K for K in range(-1, 101) if is_ours(K)] == [columns_for(CORE), columns_for(ALL)]


def test_sums_that_do_not_compile_are_told_and_refused_where_compiling_was_asked_for():
    absent = torch.device("xpu")
    assert _sums(absent, None)[1].startswith(", not compiled: ")
    with pytest.raises(RuntimeError, match="--compile: the sums do not compile here"):
        _sums(absent, True)
    assert _sums(absent, False) == (tile_sums, "")
