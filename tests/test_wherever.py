"""It works wherever Trainer works: what Trainer does to a model on the way changes no number."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.lab import Lab

FLAGS = (
    "--max_steps 4 --learning_rate 1e-3 --per_device_train_batch_size 4 --weight_decay 0.1 "
    "--gradient_accumulation_steps 2 --train_sampling_strategy sequential "
)
REENTRANT = '--gradient_checkpointing --gradient_checkpointing_kwargs {"use_reentrant":true}'
CHECKPOINTS = [REENTRANT, REENTRANT.replace("true", "false")]


def outcome(lab: Lab, name: str, method: str, flags: str = "", **options) -> tuple[list, dict]:
    """(the loss of each step, what was saved)."""
    lab.train(name, method, FLAGS + flags, **options)
    kind = "adapter_model" if options.get("lora_r") else "model"
    losses = [entry["loss"] for entry in lab.history(name) if "loss" in entry]
    return losses, load_file(lab.root / name / f"{kind}.safetensors")


@pytest.fixture(scope="module")
def plain(lab):
    """Outcomes of a method as it is: full fine-tuning, and an adapter."""
    known, before = {}, load_file(f"{lab.model}/model.safetensors")

    def of(method: str, **options) -> tuple[list, dict]:
        key = method, *options.items()
        if key not in known:
            losses, saved = known[key] = outcome(
                lab, f"plain-{method}-{options}", method, **options
            )
            for name, tensor in saved.items():  # it learns, so that equality says something
                moved = tensor - before.get(
                    name, torch.zeros(())
                )  # an adapter adds nothing at first
                assert "lora_A" in name or moved.abs().max() > 1e-3, name
        return known[key]

    return of


def assert_equal(one: tuple[list, dict], other: tuple[list, dict]) -> None:
    assert len(one[0]) == len(other[0]) == 4
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def mlp_calls():
    """Counts how often a layer's MLP is run in training."""
    calls = []

    def count(module, _):
        if type(module).__name__ == "LlamaMLP" and module.training:
            calls.append(1)

    hook = register_module_forward_pre_hook(count)
    yield calls
    hook.remove()


@pytest.mark.parametrize("lora", [{}, {"lora_r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("flags", CHECKPOINTS, ids=["reentrant", "not"])
@pytest.mark.parametrize("method", ["sft", "prift-mass"])
def test_gradient_checkpointing(lab, plain, mlp_calls, method, flags, lora):
    expected = plain(method, **lora)
    mlp_calls.clear()
    name = f"{method}-{'true' in flags}-{len(lora)}"
    assert_equal(outcome(lab, name, method, flags, **lora), expected)
    assert len(mlp_calls) == 4 * 2 * 2 * 2  # steps, micro-batches, layers; and each layer twice


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("sft", "eager"),
        ("prift-mass", "eager"),
        *(
            pytest.param(method, backend, marks=pytest.mark.slow)
            for method in ("sft", "dft", "prift-mass")
            for backend in ("aot_eager", "inductor")
        ),
    ],
)
def test_torch_compile(lab, plain, method, backend):
    expected = plain(method)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    flags = f"--torch_compile_backend {backend}"
    assert_equal(outcome(lab, f"{method}-{backend}", method, flags), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled


@pytest.mark.parametrize("method", ["sft", "prift-mass"])
def test_bfloat16_autocast(lab, plain, method):
    """Off by no more than the body's rounding explains; the weights are the prior's, to the bit."""
    expected = plain(method)
    losses, saved = outcome(lab, f"{method}-bf16", method, "--bf16")
    assert losses != expected[0]
    np.testing.assert_allclose(losses, expected[0], rtol=2**-8)
    assert {t.dtype for t in saved.values()} == {torch.float32}
    both = lab.history(f"{method}-bf16"), lab.history(f"plain-{method}-{{}}")
    for one, other in zip(*both, strict=True):
        assert one.get("mean_weight") == other.get("mean_weight")
