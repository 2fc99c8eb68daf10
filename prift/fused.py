"""Fused kernels of other packages for the loss, used on CUDA where they are right and faster.

What stands between a kernel and the gradient of a run is a test at start, on the run's own head:
its loss and gradients against prift's own, both through `weighted_loss`, on random rows whose
weights are positive, negative and zero. A kernel that rounds its logits, adds partial sums up in
half precision, leaves small gradients out or takes one weight for all tokens differs by more than
the rounding of its operands, and is not used.

Apple's cut-cross-entropy (arXiv 2411.09009) has such a kernel, `cce_exact`, in its repository
(apple/ml-cross-entropy) and not in its package of early 2025, which adds up in half precision.
Liger's are not asked: one rounds logits to the operands' precision, the other stages them in
float16 and adds gradients up in bfloat16.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prift.chunk import sums_for
from prift.errors import first_line
from prift.heads import Head, head_of
from prift.loss import Kernel, weighted_loss
from prift.memory import free_memory
from prift.stats import tile_sums
from prift.weigher import Rule, Weigher
from prift.wholechunk import passes

_ROWS = 1024  # enough for many blocks of rows, whose sums a kernel may round one by one
_SPREAD = (0.5, 20.0)  # of a row's logits: flat ones, and those that meet a soft cap
_WORST = 32  # a row of a gradient may be this many times as far off as the whole
_WORTH = 0.9  # of prift's own time; more is no reason to leave what every test covers


def cut_cross_entropy(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """float32 nll [N]. A scale that is no power of two rounds the hidden states, and shows."""
    from cut_cross_entropy import linear_cross_entropy

    bias = head.bias
    if head.scale != 1.0:
        hidden_NH, bias = hidden_NH * head.scale, None if bias is None else bias * head.scale
    optional = {} if bias is None else {"bias": bias}
    return linear_cross_entropy(
        hidden_NH,
        head.weight,
        targets_N,
        softcap=head.softcap,
        reduction="none",
        impl="cce_exact",
        **optional,
    )


KERNELS: dict[str, Callable[[Tensor, Head, Tensor], Tensor]] = {
    "cut_cross_entropy": cut_cross_entropy,
}
"""Package -> (hidden [N, H], head, targets [N]) -> nll [N]."""


def kernel_for(model: nn.Module, training: Any, say: Callable[[str], None]) -> Kernel | None:
    """`choose` for a causal language model and its transformers.TrainingArguments."""
    head = head_of(model)
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    return choose(head, training.device, half or head.weight.dtype, say)


def choose(
    head: Head,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
    kernels: Mapping[str, Callable[[Tensor, Head, Tensor], Tensor]] | None = None,
) -> Kernel | None:
    """The first kernel that passes the test and is faster, or None for prift's own; says which.

    head     of the model to be trained, wherever it lies
    dtype    in which hidden states and head will be multiplied there
    kernels  those to try; by default, on CUDA, those of KERNELS that are installed
    """
    if kernels is None:
        _tell(device.type, len(head.weight), say)
        if device.type != "cuda":
            return None
        kernels = {n: k for n, k in KERNELS.items() if importlib.util.find_spec(n)}
    bias = None if head.bias is None else head.bias.detach().to(device, dtype)
    head = replace(head, weight=head.weight.detach().to(device, dtype), bias=bias)
    for name, nll in kernels.items():
        kernel, took = Kernel(name, nll, device.type, dtype), float("nan")
        try:
            reason = misfit(kernel, head)
            if reason is None:
                took = _relative_time(kernel, head)
                if took > _WORTH:
                    reason = f"it takes {took:.2f} times as long as prift's own"
        except Exception as error:  # whatever another package and its compiler may raise
            reason = f"it fails ({type(error).__name__}: {first_line(error)})"
        free_memory()
        if reason is None:
            say(f"loss: the kernel of {name}, in {took:.2f} of the time of prift's own")
            return kernel
        say(f"loss: not the kernel of {name}: {reason}")
    return None


def _tell(kind: str, vocabulary: int, say: Callable[[str], None]) -> None:
    """Compiles what prift's own loss passes over logits with, and says so."""
    if kind == "cuda":
        refusal = passes(kind).refusal
    else:
        sums, refusal = sums_for(vocabulary)
        if sums is tile_sums and refusal is None:
            return
    how = "compiled" if refusal is None else f"not compiled, so slower: {refusal}"
    say(f"loss: prift's own is {how}")


def misfit(kernel: Kernel, head: Head, rows: int = _ROWS) -> str | None:
    """Why `kernel` may not stand in for prift's own loss of this head, or None where it may.

    head  on the kernel's device and in its dtype
    """
    hidden, targets = _case(head, rows)
    weights = torch.randn(rows, generator=_generator(head), device=hidden.device)
    weights[::4] = 0
    # Of batch scope, so that rows of weight zero are run too, as online ones are.
    given = Weigher.of(Rule("given", (), lambda stats: weights, scope="batch"), "online")
    ours, theirs = (_gradients(way, head, hidden, targets, given) for way in (None, kernel))
    apart = (theirs["nll"] - ours["nll"]).abs()
    if not bool((apart <= 1e-3 + 1e-4 * ours["nll"]).all()):
        return f"its nll is off by up to {float(apart.max()):.2g} nats"
    budget = max(torch.finfo(kernel.dtype).eps / 2, 1e-5)
    for name in ("hidden", "weight", "bias"):
        if name in ours:
            found = _deviation(theirs[name], ours[name])
            if not found <= budget:
                return f"its gradient of {name} is off by {found:.2g}, which is over {budget:.2g}"
    return None


def _relative_time(kernel: Kernel, head: Head) -> float:
    """Time of forward and backward with the kernel over that without, every row of weight 1."""
    hidden, targets = _case(head, _ROWS)
    plain = Weigher.of(Rule("uniform", (), lambda stats: torch.ones(())), None)
    ours, theirs = (_seconds(way, head, hidden, targets, plain) for way in (None, kernel))
    return theirs / ours


def _generator(head: Head) -> torch.Generator:
    return torch.Generator(head.weight.device).manual_seed(0)


def _case(head: Head, rows: int) -> tuple[Tensor, Tensor]:
    """Hidden states [rows, H] and targets [rows]; logits from flat to peaked, row by row."""
    (V, H), generator = head.weight.shape, _generator(head)
    options = {"device": head.weight.device, "generator": generator}
    length = torch.linalg.vector_norm(head.weight, dtype=torch.float32) / V**0.5
    spread = torch.linspace(*_SPREAD, rows, device=head.weight.device)
    hidden = torch.randn(rows, H, **options) * (spread / (length * abs(head.scale)))[:, None]
    return hidden.to(head.weight.dtype), torch.randint(V, (rows,), **options)


def _gradients(
    kernel: Kernel | None, head: Head, hidden_NH: Tensor, targets_N: Tensor, weigher: Weigher
) -> dict[str, Tensor]:
    """nll, and the gradients of the sum of weights * nll."""
    leaves = {"hidden": hidden_NH, "weight": head.weight, "bias": head.bias}
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items() if t is not None}
    own = replace(head, weight=leaves["weight"], bias=leaves.get("bias"))
    out = weighted_loss(leaves["hidden"], own, targets_N, weigher, None, kernel=kernel)
    out.loss.backward()
    return {"nll": out.nll} | {name: leaf.grad for name, leaf in leaves.items()}


def _deviation(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| of the whole or, over _WORST, of the row furthest off."""
    found, wanted = torch.atleast_2d(found, wanted)
    apart, size = (
        torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in (found - wanted, wanted)
    )
    worst = (apart / size.clamp_min(torch.finfo(torch.float32).tiny)).max()
    return float(torch.maximum(apart.norm() / size.norm(), worst / _WORST))


def _seconds(kernel: Kernel | None, *case) -> float:
    """Wall seconds of forward and backward, least of three."""
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        float(_gradients(kernel, *case)["hidden"].sum())  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return best
