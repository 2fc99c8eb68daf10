"""What must hold between statistics holds for every distribution, and is broken by mistakes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.stats import CORE, STATISTICS, token_stats
from prift.store.invariants import broken
from tests import references


def real(seed: int, rows: int = 64, vocabulary: int = 50, scale: float = 3.0) -> dict:
    """Float64 statistics of random logits, in the types they are stored in."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, vocabulary)) * scale
    logits[::3] = logits[::3].round()  # ties
    logits[rng.random(logits.shape) < 0.02] = -np.inf
    logits[:, 0] = np.where(np.isfinite(logits).any(1), logits[:, 0], 0.0)
    targets = rng.integers(vocabulary, size=rows)
    found = [
        references.token_stats(z.astype(np.float32), y)
        for z, y in zip(logits, targets, strict=True)
    ]
    whole = ("rank", "n_tie")
    return {
        n: np.array([one[n] for one in found], np.int32 if n in whole else np.float32)
        for n in STATISTICS["extended"]
    }


def names_of(values: dict, **more) -> set[str]:
    return {name for name, _, _ in broken(values, **more)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    vocabulary=st.integers(2, 300),
    scale=st.floats(0, 60),
    half=st.booleans(),
)
def test_hold_for_every_distribution(seed, vocabulary, scale, half):
    values = real(seed, 32, vocabulary, scale)
    names = ()
    if half:
        names = ("logprob", "log_mass_rank", "entropy", "entropy_top20")
        values |= {n: values[n].astype(np.float16).astype(np.float32) for n in names}
    assert list(broken(values, names, vocabulary)) == []
    assert list(broken({n: values[n] for n in CORE}, names)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hold_for_what_prift_computes(dtype):
    torch.manual_seed(0)
    for scale in (0.0, 0.1, 3.0, 40.0, 300.0):
        logits = (torch.randn(200, 20_000) * scale).to(dtype)
        targets = torch.cat([logits[:100].argmax(1), torch.randint(20_000, (100,))])
        stats = token_stats(logits, targets, STATISTICS["extended"])
        values = {n: getattr(stats, n).numpy() for n in stats.names()}
        assert [(n, w) for n, w, _ in broken(values, (), 20_000)] == []


@pytest.mark.parametrize("name", CORE)
def test_a_column_shifted_by_a_token_breaks_some(name):
    values = real(1)
    assert names_of(values) == set()
    assert names_of(values | {name: np.roll(values[name], 1)}) or name == "n_tie"


SINGLE = [  # all of a token of probability 1/4 with 1/2 above it, in a vocabulary of 3
    ("logprob", 0.1, "logprob"),
    ("logprob", np.nan, "logprob"),
    ("logprob", -0.5, "log_mass_rank"),
    ("log_mass_rank", 0.1, "log_mass_rank"),
    ("log_mass_rank", 0.0, "log_mass_rank"),
    ("log_mass_rank", np.nan, "log_mass_rank"),
    ("log_mass_rank", -3.0, "log_mass_rank"),
    ("rank", 0, "rank"),
    ("rank", 1, "log_mass_rank"),
    ("rank", 9, "rank"),
    ("n_tie", 0, "n_tie"),
    ("n_tie", 3, "log_mass_rank"),
    ("entropy", -0.1, "entropy"),
    ("entropy", np.nan, "entropy"),
    ("entropy", np.inf, "entropy"),
    ("entropy", 1.2, "entropy"),
    ("entropy", 0.3, "entropy"),
    ("collision", 0.0, "collision"),
    ("collision", 1.1, "collision"),
    ("collision", 0.2, "collision"),
    ("collision", np.nan, "collision"),
    ("expected_rank", 0.5, "expected_rank"),
    ("expected_rank", 3.1, "expected_rank"),
    ("entropy_top20", -1.0, "entropy_top20"),
    ("entropy_top20", 3.5, "entropy_top20"),
]


@pytest.mark.parametrize(("name", "value", "told"), SINGLE)
def test_one_wrong_value(name, value, told):
    found = references.token_stats(np.log(np.array([0.5, 0.25, 0.25], np.float32)), 1)
    token = {n: np.array([found[n]] * 3, np.float32) for n in STATISTICS["extended"]}
    assert names_of(token, vocabulary=3) == set()
    token[name][1] = value
    got = list(broken(token, vocabulary=3))
    assert told in {n for n, _, _ in got}
    assert all(where.tolist() == [False, True, False] for _, _, where in got)
