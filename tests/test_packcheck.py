"""Which models are refused before they are trained on packed sequences, and why."""

import pytest

from prift.errors import ModelError
from prift.packcheck import check_packing
from tests.families import tiny
from tests.varlen import on_the_cpu


@pytest.fixture(autouse=True)
def kernel():
    with on_the_cpu():
        yield


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "soft-caps its attention"),
        ("gpt-oss", "has sinks"),
        ("mamba", "linear_attention"),
        ("falcon-h1", "carry a state from token to token"),
        ("qwen3-next", "linear_attention"),
        ("falcon", "its attention is its own"),
        ("mpt", "no position ids"),
        ("gpt2", "no dropout .set it to 0 in config.json"),
        ("nemotron", "do not hand on where sequences end"),
        ("deepseek-v3", "the kernel takes one width"),
    ],
)
def test_a_model_that_cannot_is_refused(family, reason):
    with pytest.raises(ModelError, match=reason) as error:
        check_packing(tiny(family))
    assert "cannot run packed sequences" in str(error.value)
    assert "Leave --packing out" in str(error.value)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_trial_leaves_the_model_in_training_as_it_was(family):
    model = tiny(family).train()
    try:
        check_packing(model)
    except ModelError:
        assert family == "gpt2"
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
