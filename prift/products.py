"""Matrix products with the vocabulary, accumulated in float32 whatever the operands are.

CUDA multiplies half-precision operands straight into float32. The CPU has no such product, so
slices of the projection are widened there; that is exact, and costs a copy of a slice.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_SLICE_ROWS = 4096  # vocabulary rows widened at a time


def project(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
    """hidden @ weight.T, float32 [N, V], never rounded to the operands' precision."""
    if hidden_NH.dtype == weight_VH.dtype == torch.float32:
        return hidden_NH @ weight_VH.T
    if hidden_NH.is_cuda and hidden_NH.dtype == weight_VH.dtype:
        return torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32)
    hidden_NH = hidden_NH.float()
    out_NV = hidden_NH.new_empty(hidden_NH.shape[0], weight_VH.shape[0])
    for part in _slices(weight_VH.shape[0]):
        out_NV[:, part] = hidden_NH @ weight_VH[part].float().T
    return out_NV


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
