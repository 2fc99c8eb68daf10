"""The helper itself, against the naive definition. No engine."""

import math

import numpy as np
import pytest
import torch
import transformers as tf

from tests import references
from tests.vllm import models
from tests.vllm.brackets import NEAR, brackets, check, check_decisions


def test_without_near_ties_both_ends_are_the_definition():
    z = torch.linspace(-8, 8, 60).double()[torch.randperm(60, generator=torch.manual_seed(0))]
    found = brackets(z.expand(60, 60), torch.arange(60))
    for y in range(60):
        truth = references.token_stats(z.numpy(), y)
        assert found.near[y] == 0
        assert found.rank_least[y] == found.rank_most[y] == truth["rank"]
        for name in ("mass_least", "mass_most"):
            assert getattr(found, name)[y] == pytest.approx(truth["log_mass_rank"], abs=1e-12)
        assert found.logprob[y] == pytest.approx(truth["logprob"], abs=1e-12)
        assert found.entropy[y] == pytest.approx(truth["entropy"], abs=1e-12)


def test_a_near_tie_may_stand_on_either_side():
    """Logits moved by less than half of NEAR give what lies inside, whatever the moves; and both
    ends are reached."""
    z = np.array([2.0, 1.0004, 1.0, 0.9997, -1.0, 1.5])
    found = brackets(torch.tensor(z[None]), torch.tensor([2]))
    generator, seen = np.random.default_rng(0), []
    for _ in range(200):
        moved = z + generator.uniform(-NEAR / 2, NEAR / 2, len(z))
        truth = references.token_stats(moved, 2)
        assert found.rank_least[0] <= truth["rank"] <= found.rank_most[0]
        slack = NEAR  # the members' own probabilities move as well
        assert truth["log_mass_rank"] >= found.mass_least[0] - slack
        assert truth["log_mass_rank"] <= found.mass_most[0] + slack
        seen.append(truth["rank"])
    assert (found.rank_least[0], found.rank_most[0], found.near[0]) == (3, 5, 2)
    assert set(seen) == {3, 4, 5}


def test_what_is_outside_is_found():
    z = torch.randn(5, 40, generator=torch.manual_seed(0)).double() * 3
    y = torch.arange(5)
    truth = [references.token_stats(row.numpy(), int(t)) for row, t in zip(z, y, strict=True)]
    names = ("logprob", "log_mass_rank", "rank", "n_tie", "entropy")
    right = {n: np.array([t[n] for t in truth]) for n in names}
    allowed = brackets(z, y)
    check(right, allowed)
    for name, off in [("logprob", 2e-4), ("entropy", -2e-4), ("rank", 1), ("n_tie", 1)]:
        wrong = {**right, name: right[name] + off}
        with pytest.raises(AssertionError):
            check(wrong, allowed)
    with pytest.raises(AssertionError):
        check({**right, "log_mass_rank": right["log_mass_rank"] - 3e-4}, allowed)
    log_u = right["log_mass_rank"]
    tau = math.exp(float(log_u[1]) - 0.01)
    assert check_decisions(log_u, log_u, allowed, (tau,)) == 5
    with pytest.raises(AssertionError):
        check_decisions(log_u, log_u - 0.02, allowed, (tau,))


@torch.no_grad()
def test_the_widened_stories_model_is_the_same(stories, tmp_path):
    wide = models.widened(stories, tmp_path)
    ids = torch.randint(0, 512, (2, 300), generator=torch.manual_seed(0))
    one, other = (
        tf.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64)(ids).logits
        for f in (stories, wide)
    )
    assert one.std() > 1
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # angles are float32 there
