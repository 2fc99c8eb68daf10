"""The self-test of the exact way: right columns pass, and every way in which a vLLM whose insides
have moved might fill them wrongly is found."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prift.backends.vllm_selftest import PUBLIC_K, fault, probe, wrong_head
from prift.backends.vllm_worker import pack
from tests.cache_fixtures import IDENTITY
from tests.test_vllm_bounds import public
from tests.test_vllm_columns import drawn

V, N = 2000, 23


def packed(logits, targets, K=3):
    """As `Engine.ask` has it."""
    ids, columns, ranks = pack(logits, targets, K)
    return ids.numpy(), columns.double().numpy(), ranks.numpy()


def asked(logits, targets):
    """vLLM's own answer, as `Engine.ask` has it."""
    columns, reaching = public(logits, targets, PUBLIC_K)
    ids = torch.cat([targets[:, None], logits.topk(PUBLIC_K, 1).indices], 1)
    return ids.numpy(), columns.astype(np.float64), reaching


def judged(ours, logits, targets, dtype="float32"):
    return fault(ours, asked(logits, targets), targets.numpy(), V, dtype)


@pytest.fixture(params=[0.3, 3.0, 12.0], ids=["flat", "like a model", "peaked"])
def case(request):
    return drawn(N, V, seed=1, scale=request.param)


def test_right_columns_pass(case):
    assert judged(packed(*case), *case) is None


def test_rounding_between_two_runs_passes(case):
    logits, targets = case
    near = logits + torch.randn(N, V, generator=torch.Generator().manual_seed(2)) * 2e-5
    assert judged(packed(near, targets), logits, targets) is None
    near = logits + torch.randn(N, V, generator=torch.Generator().manual_seed(2)) * 1e-2
    assert judged(packed(near, targets), logits, targets, "bfloat16") is None


WRONG = {
    "vLLM's own columns": lambda z, y: tuple(p[:, :4] if p.ndim > 1 else p for p in asked(z, y)),
    "targets of the next row": lambda z, y: packed(z, y.roll(1)),
    "another row's logits": lambda z, y: packed(z.roll(1, 0), y),
    "log-probabilities times two": lambda z, y: packed(2 * z.log_softmax(1), y),
    "a cut vocabulary": lambda z, y: packed(torch.where(torch.arange(V) % 2 == 0, z, -9.0), y),
    "too many columns": lambda z, y: packed(z, y, 6),
    "a row less": lambda z, y: tuple(part[1:] for part in packed(z, y)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_columns_are_found(what):
    logits, targets = drawn(N, V, seed=1)
    assert judged(WRONG[what](logits, targets), logits, targets) is not None


@pytest.mark.parametrize("column, factor", [(0, 1.01), (1, 1.5), (2, 3), (3, 1.3), (3, 0.5)])
def test_each_column_matters(column, factor):
    logits, targets = drawn(N, V, seed=1)
    ours = packed(logits, targets)
    assert judged(ours, logits, targets) is None
    ours[1][:, column] *= factor
    assert judged(ours, logits, targets) is not None


def test_ranks_matter():
    logits, targets = drawn(N, V, seed=1)
    ids, columns, ranks = packed(logits, targets)
    assert judged((ids, columns, ranks + 50), logits, targets) is not None


def test_a_broken_model_is_not_the_functions_fault_and_verifies_nothing():
    """Positions at which the model is broken are not compared, all others are."""
    logits, targets = drawn(N, V, seed=1)
    logits[: N // 2, 7] = torch.nan
    assert judged(packed(logits, targets), logits, targets) is None
    wrong = logits.clone()
    wrong[N // 2 :] *= 2
    assert judged(packed(wrong, targets), logits, targets) is not None
    logits[:, 7] = torch.nan
    assert "nothing is verified" in judged(packed(logits, targets), logits, targets)


@pytest.mark.parametrize("vocabulary, most", [(2, 100), (512, 511), (151_936, 8), (50, 2)])
def test_the_prompts_fit(vocabulary, most):
    for prompt in probe(vocabulary, most):
        assert 2 <= len(prompt) <= most
        assert all(0 <= token < vocabulary for token in prompt)


@pytest.mark.parametrize(
    ("dtype", "logits_dtype", "seen", "wrong"),
    [
        ("float32", "float32", {"float32"}, None),
        ("float32", "float32", set(), None),
        ("float32", "float32", {"bfloat16"}, "logits are bfloat16, and float32 is asked for"),
        ("bfloat16", "float32", {"float32"}, None),
        ("bfloat16", "float32", {"bfloat16"}, "logits are bfloat16"),
        ("float16", "float32", {"float16", "float32"}, "logits are float16, float32"),
        ("float16", "float32", set(), "does not show"),
        ("bfloat16", "bfloat16", {"bfloat16"}, None),
        ("float32", "bfloat16", {"float32"}, None),
    ],
)
def test_a_head_that_rounds_is_not_taken_for_float32(dtype, logits_dtype, seen, wrong):
    identity = replace(IDENTITY, dtype=dtype, logits_dtype=logits_dtype)
    found = wrong_head(identity, seen)
    assert found is None if wrong is None else wrong in found
