"""bfloat16 in an engine: of the logits alone, and of the model with a head in float32."""

import numpy as np
import pytest

from tests.vllm import models
from tests.vllm.scorers import scorer, scores

LENGTHS = [2, 60, 100, 200, 256]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.make(tmp_path_factory.mktemp("llama"), "llama", tied=False)


@pytest.fixture(scope="module")
def sequences(folder):
    return models.sequences(folder, LENGTHS)


def joined(folder, sequences, **options) -> dict[str, np.ndarray]:
    """Statistics of all sequences, one behind the other."""
    with scorer(folder, **options) as one:
        found = scores(one, sequences)
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def test_logits_rounded_to_bfloat16(folder, sequences):
    """Both backends round the same logits, which differ by some 1e-5: few of them fall on the
    other side of a step, of 1/32 and more where logits are about 5 and more."""
    ours, theirs = (
        joined(folder, sequences, backend=backend, logits_dtype="bfloat16")
        for backend in ("vllm", "hf")
    )
    assert (theirs["n_tie"] > 1).mean() > 0.05  # so that ties are there to be counted
    for name in ("rank", "n_tie"):
        assert (ours[name] == theirs[name]).mean() > 0.98, name
    for name in ("logprob", "log_mass_rank"):
        assert (np.abs(ours[name] - theirs[name]) < 1e-3).mean() > 0.98, name


def test_a_bfloat16_model_has_logits_in_float32(folder, sequences):
    """Ties are gone, and the model is as far from float32 as transformers' is."""
    ours = joined(folder, sequences, backend="vllm", dtype="bfloat16")
    theirs = joined(folder, sequences, dtype="bfloat16")
    exact = joined(folder, sequences)
    assert (ours["n_tie"] > 1).mean() < 0.01
    own, other = (np.abs(x["logprob"] - exact["logprob"]).mean() for x in (ours, theirs))
    assert 0 < own < 2 * other
    assert np.abs(ours["logprob"] - theirs["logprob"]).mean() < 2 * other
