"""Kernels of other packages in prift's loss: what the test at start lets through, and what not."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prift.fused import KERNELS, choose, misfit
from prift.heads import Head
from prift.loss import Kernel, weighted_loss
from prift.methods import weigher
from prift.native import compiler
from prift.stats import token_stats
from tests.lab import Lab
from tests.test_loss import case, check, given_weights, naive

CPU = torch.device("cpu")
needs_torchs = pytest.mark.skipif(
    not hasattr(functional, "linear_cross_entropy"), reason="torch 2.13 has this kernel"
)


def torchs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Torch's own chunked linear cross-entropy: right in float32, without soft cap."""
    return functional.linear_cross_entropy(
        hidden * head.scale,
        head.weight,
        targets,
        linear_bias=None if head.bias is None else head.bias * head.scale,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )


TORCHS = Kernel("torch", torchs, "cpu", torch.float32)


def head_like(dtype=torch.float32, bias=True, device="cpu", **options) -> Head:
    torch.manual_seed(0)
    weight, bias_V = torch.randn(3000, 64) * 0.05, torch.randn(3000) if bias else None
    options["bias"] = None if bias_V is None else bias_V.to(device, dtype)
    return Head(weight.to(device, dtype), **options)


class OneWeight(torch.autograd.Function):
    """What Liger's did for non-uniform weights until 2026: every token's gradient by one factor."""

    @staticmethod
    def forward(ctx, z, targets):
        ctx.save_for_backward(z, targets)
        return functional.cross_entropy(z, targets, reduction="none")

    @staticmethod
    def backward(ctx, grad):
        z, targets = ctx.saved_tensors
        return grad.mean() * (z.softmax(1) - functional.one_hot(targets, z.shape[1])), None


class Filtered(OneWeight):
    """Gradients of less than a threshold are left out, as cut-cross-entropy does by default."""

    @staticmethod
    def backward(ctx, grad):
        z, targets = ctx.saved_tensors
        found = z.softmax(1) - functional.one_hot(targets, z.shape[1])
        return grad[:, None] * functional.threshold(found.abs(), 2**-12, 0) * found.sign(), None


def logits(hidden: Tensor, head: Head) -> Tensor:
    return hidden @ head.weight.T + head.bias


def rounded(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Logits rounded to bfloat16, as most kernels have them."""
    z = logits(hidden, head).bfloat16().float()
    return functional.cross_entropy(z, targets, reduction="none")


def shifted(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """The last row with the target of the one before: an edge of a block."""
    targets = torch.cat([targets[:-1], targets[-2:-1]])
    return functional.cross_entropy(logits(hidden, head), targets, reduction="none")


def crashing(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits(hidden, head), targets[1:], reduction="none")


WRONG: dict[str, tuple[Callable, str]] = {
    "one weight": (
        lambda h, head, y: OneWeight.apply(logits(h, head), y),
        "its gradient of hidden",
    ),
    "filtered": (lambda h, head, y: Filtered.apply(logits(h, head), y), "its gradient of"),
    "rounded": (rounded, "its nll is off"),
    "shifted": (shifted, "its nll is off"),
    "crashing": (crashing, "it fails (ValueError: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_refused_and_said_why(name):
    said = []
    wrong, reason = WRONG[name]
    assert choose(head_like(), CPU, torch.float32, said.append, {name: wrong}) is None
    assert len(said) == 1 and f"not the kernel of {name}: {reason}" in said[0]


@needs_torchs
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"bias": False}])
def test_a_right_kernel_passes(options):
    assert misfit(TORCHS, head_like(**options)) is None


@needs_torchs
def test_the_head_and_the_dtype_decide():
    """Torch's knows no soft cap, and answers in bfloat16 what it is asked in bfloat16."""
    assert "nll" in misfit(TORCHS, head_like(softcap=30.0))
    half = replace(TORCHS, dtype=torch.bfloat16)
    assert "nll" in misfit(half, head_like(torch.bfloat16))


@needs_torchs
def test_a_kernel_is_chosen_unless_it_is_slower():
    said = []
    found = choose(head_like(), CPU, torch.float32, said.append, {"torch": torchs})
    slower = "times as long as prift's own" in said[0]
    assert (found is None) == slower and (slower or said[0].startswith("loss: the kernel of torch"))
    assert found is None or (found.device, found.dtype) == ("cpu", torch.float32)


def test_without_a_gpu_there_is_nothing_to_choose():
    said = []
    assert choose(head_like(), CPU, torch.float32, said.append) is None and not said
    assert choose(Head(torch.randn(16_384, 8)), CPU, torch.float32, said.append) is None
    how = "compiled" if compiler() else "not compiled, so slower: torch.compile failed"
    assert len(said) == 1 and said[0].startswith(f"loss: prift's own is {how}")


@needs_torchs
@pytest.mark.parametrize("weights", ["random", "zeros", "one", "negative", "sparse"])
def test_gradients_through_a_kernel_equal_the_naive_ones(weights):
    hidden, weight, bias, targets = case(40, seed=len(weights))
    values = {
        "random": torch.rand(40), "zeros": torch.zeros(40), "one": torch.eye(40)[3],
        "negative": torch.randn(40), "sparse": torch.rand(40) * (torch.rand(40) < 0.3),
    }[weights]  # fmt: skip
    chosen, prior = given_weights(values)
    head = Head(weight, bias, 0.5)
    ours = weighted_loss(hidden, head, targets, chosen, prior, every_nll=True, kernel=TORCHS)
    expected = naive(hidden, weight, bias, targets, values, 0.5)
    torch.testing.assert_close(ours.nll.double(), expected[1], rtol=1e-5, atol=1e-5)
    check(hidden, weight, bias, targets, ours, expected, 1e-5)
    assert torch.equal(ours.weights, values)


@needs_torchs
@pytest.mark.parametrize("name", ["uniform", "prob", "mass"])
def test_online_rules_weigh_with_what_the_kernel_says(name):
    hidden, weight, bias, targets = case(40, seed=5)
    chosen = weigher(name, "online", {})

    def weights(z, y):
        return chosen(token_stats(z.float(), y)).expand(len(y))

    expected = naive(hidden, weight, bias, targets, weights)
    ours = weighted_loss(hidden, Head(weight, bias), targets, chosen, None, kernel=TORCHS)
    assert "Weighted" not in type(ours.loss.grad_fn).__name__  # the sum, not prift's own function
    check(hidden, weight, bias, targets, ours, expected, 1e-5)


def test_what_a_kernel_was_not_tried_on_is_prifts_own():
    hidden, weight, bias, targets = case(6, seed=2, dtype=torch.bfloat16)
    head, sft = Head(weight, bias), weigher("uniform", None, {})
    kernel = Kernel("crashing", crashing, "cpu", torch.float32)
    found = weighted_loss(hidden, head, targets, sft, None, kernel=kernel)
    assert torch.equal(found.loss, weighted_loss(hidden, head, targets, sft, None).loss)
    none = weighted_loss(
        hidden[:0].float(), Head(weight.float()), targets[:0], sft, None, kernel=kernel
    )
    assert float(none.loss.detach()) == 0


@needs_torchs
def test_a_run_with_a_kernel_is_the_run_without(tmp_path, monkeypatch):
    calls, lab = [], Lab(tmp_path)

    def counted(*inputs):
        calls.append(1)
        return torchs(*inputs)

    lab.precompute()
    lab.train("own", "prift-prob", "--max_steps 3")
    monkeypatch.setattr("prift.train.kernel_for", lambda *_: replace(TORCHS, nll=counted))
    lab.train("kernel", "prift-prob", "--max_steps 3")
    own, other = (lab.history(name) for name in ("own", "kernel"))
    assert len(calls) >= 3
    for key in ("loss", "grad_norm", "nll"):
        one, two = ([entry[key] for entry in log if key in entry] for log in (own, other))
        assert len(one) >= 3 and one == pytest.approx(two, rel=1e-4), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels are for a GPU")
@pytest.mark.parametrize("package", KERNELS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"softcap": 30.0}, {"scale": 0.25}])
def test_the_kernels_themselves(package, options):
    module = pytest.importorskip(package)
    said, cuda = [], torch.device("cuda")
    head = head_like(torch.bfloat16, device="cuda", **options)
    if "bias" not in inspect.signature(module.linear_cross_entropy).parameters:
        assert choose(head, cuda, torch.bfloat16, said.append) is None  # the package of early 2025
        assert f"loss: not the kernel of {package}: " in said[1]
        return
    kernel = Kernel(package, KERNELS[package], "cuda", torch.bfloat16)
    assert misfit(kernel, head) is None
    found = choose(head, cuda, torch.bfloat16, said.append)
    assert said[0] == "loss: prift's own is compiled"
    assert len(said) == 2 and (found is not None or "times as long" in said[1])
