"""Matrix products with the vocabulary, accumulated in float32 whatever the operands are.

CUDA multiplies half-precision operands straight into float32, and so does the native product of a
CPU. Without it, slices of the projection are widened on a CPU; that is exact, and costs a copy of
a slice and the slower float32 arithmetic. None of these products has a gradient of its own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from prift import native

_SLICE_ROWS = 4096  # vocabulary rows widened at a time
_SMALL = 1 << 20  # multiplications below which the native product's start costs more than it saves


def project(hidden_NH: Tensor, weight_VH: Tensor, out_NV: Tensor | None = None) -> Tensor:
    """hidden @ weight.T, float32 [N, V], never rounded to the operands' precision.

    out_NV  contiguous float32 tensor to write into
    """
    if hidden_NH.is_cuda:
        if hidden_NH.dtype == torch.float32:
            return torch.mm(hidden_NH, weight_VH.T, out=out_NV)
        return torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32, out=out_NV)
    if _is_native(hidden_NH, weight_VH):
        return native.project(hidden_NH, weight_VH, out_NV)
    if hidden_NH.dtype == weight_VH.dtype == torch.float32:
        return torch.mm(hidden_NH, weight_VH.T, out=out_NV)
    hidden_NH = hidden_NH.float()
    if out_NV is None:
        out_NV = hidden_NH.new_empty(hidden_NH.shape[0], weight_VH.shape[0])
    for part in _slices(weight_VH.shape[0]):
        out_NV[:, part] = hidden_NH @ weight_VH[part].float().T
    return out_NV


def _is_native(hidden_NH: Tensor, weight_VH: Tensor) -> bool:
    if hidden_NH.device.type != "cpu" or hidden_NH.dtype != weight_VH.dtype:
        return False
    (N, H), V = hidden_NH.shape, len(weight_VH)
    # Half-precision operands are taken in pairs; small float32 products are as well left to torch.
    fits = H % 2 == 0 if hidden_NH.dtype == torch.bfloat16 else N * V * H >= _SMALL
    return fits and min(N, V) > 0 and native.supports(hidden_NH.dtype)


def pull_back(grad_NV: Tensor, weight_VH: Tensor) -> Tensor:
    """Gradient at hidden [N, H] of `project`, float32, from the float32 gradient at its output."""
    if weight_VH.dtype == torch.float32:
        return grad_NV @ weight_VH
    if grad_NV.is_cuda:
        return torch.mm(grad_NV.to(weight_VH.dtype), weight_VH, out_dtype=torch.float32)
    out_NH = grad_NV.new_zeros(grad_NV.shape[0], weight_VH.shape[1])
    for part in _slices(weight_VH.shape[0]):
        out_NH += grad_NV[:, part] @ weight_VH[part].float()
    return out_NH


def accumulate(out_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor) -> None:
    """Adds the gradient at weight of `project` to the float32 tensor `out_VH`."""
    if grad_NV.is_cuda and hidden_NH.dtype != torch.float32:
        half_NV = grad_NV.to(hidden_NH.dtype)
        out_VH += torch.mm(half_NV.T, hidden_NH, out_dtype=torch.float32)
    else:
        out_VH.addmm_(grad_NV.T, hidden_NH.float())


def _slices(rows: int) -> Iterator[slice]:
    return (slice(i, i + _SLICE_ROWS) for i in range(0, rows, _SLICE_ROWS))
