"""A kernel for the CPU, by its own definition, of torch's variable-length attention.

Torch has none there, and none for float32. As on CUDA, keys and values have the queries' width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor

_OFF = ExitStack()  # a kernel that was defined once stays, and is off but where it is asked for


def _weights(q: Tensor, k: Tensor, scale: float | None, window: list[int]) -> Tensor:
    """float64 [heads, T, T] of one sequence: softmax over what each token may see."""
    place = torch.arange(len(q))
    back = place[:, None] - place[None]
    seen = (back >= 0) if window[1] == 0 else torch.ones_like(back, dtype=torch.bool)
    seen &= (back <= window[0]) if window[0] >= 0 else True
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _each(ends: Tensor, q: Tensor, *others: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Each sequence's part of the tensors, in float64, every query head with its own key head."""
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        parts = [x[a:b].double() for x in (q, *others)]
        yield slice(a, b), [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in parts]


def _forward(
    q, k, v, ends, ends_k, max_q, max_k, is_causal=False, scale=None, window_size=None,
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    lengths = ends.diff()
    assert q.shape[0] == k.shape[0] == v.shape[0] == int(ends[-1]) and torch.equal(ends, ends_k)
    assert int(lengths.max()) == max_q == max_k and ends.dtype == torch.int32
    assert q.shape[2] == k.shape[2] == v.shape[2], "the kernel takes one width"
    assert q.dtype == k.dtype == v.dtype, "the kernel takes one dtype"
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert seqused_k is block_table is num_splits is None
    out = torch.empty(q.shape, dtype=q.dtype)
    for rows, (one_q, one_k, one_v) in _each(ends, q, k, v):
        weights = _weights(one_q, one_k, scale, window_size)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, one_v).to(q.dtype)
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad, q, k, v, out, lse, ends, ends_k, max_q, max_k, is_causal, rng, scale=None,
    window_size=None,
):  # fmt: skip
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    for rows, (one_q, one_k, one_v, one_grad) in _each(ends, q, k, v, grad):
        weights = _weights(one_q, one_k, scale, window_size)
        pulled = torch.einsum("qhd,khd->hqk", one_grad, one_v)
        scores = weights * (pulled - (pulled * weights).sum(-1, keepdim=True)) * factor
        found = (
            torch.einsum("hqk,khd->qhd", scores, one_k),
            torch.einsum("hqk,qhd->khd", scores, one_q),
            torch.einsum("hqk,qhd->khd", weights, one_grad),
        )
        for whole, part in zip(grads, found, strict=True):
            heads = part.unflatten(1, (whole.shape[1], -1)).sum(2)  # of the queries on one key
            whole[rows] = heads.to(whole.dtype)
    return tuple(grads)


@cache
def _operators() -> list:
    """Torch's operators, with the kernels above, which are off."""
    import torch.nn.attention.varlen as varlen

    kernels = {varlen._varlen_attn: _forward, varlen._varlen_attn_backward: _backward}
    for operator, kernel in kernels.items():
        operator.register_kernel("cpu")(kernel)
        _OFF.enter_context(operator.set_kernel_enabled("cpu", False))
    return list(kernels)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Torch's variable-length attention runs on the CPU too, in any dtype."""
    with ExitStack() as on:
        for operator in _operators():
            on.enter_context(operator.set_kernel_enabled("cpu", True))
        yield
