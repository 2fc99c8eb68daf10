"""Matrix products with the vocabulary, accumulated in float32 whatever the operands are.

CUDA multiplies half-precision operands straight into float32, and so does the native product of a
CPU. Without it, slices of the projection are widened on a CPU; that is exact, and costs a copy of
a slice and the slower float32 arithmetic. None of these products has a gradient of its own.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from prift import native

_SLICE_ROWS = 4096  # vocabulary rows widened at a time
_NARROW = 64  # hidden size below which torch's own float32 product is as good
_SMALL = 1 << 20  # multiplications below which the native product's start costs more than it saves


def project(hidden_NH: Tensor, weight_VH: Tensor, out_NV: Tensor | None = None) -> Tensor:
    """hidden @ weight.T, float32 [N, V], never rounded to the operands' precision.

    out_NV  contiguous float32 tensor to write into
    """
    if hidden_NH.is_cuda:
        if hidden_NH.dtype == torch.float32:
            return torch.mm(hidden_NH, weight_VH.T, out=out_NV)
        return torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32, out=out_NV)
    if _projects_natively(hidden_NH, weight_VH):
        return native.project(hidden_NH, weight_VH, out_NV)
    if hidden_NH.dtype == weight_VH.dtype == torch.float32:
        return torch.mm(hidden_NH, weight_VH.T, out=out_NV)
    hidden_NH = hidden_NH.float()
    if out_NV is None:
        out_NV = hidden_NH.new_empty(hidden_NH.shape[0], weight_VH.shape[0])
    for part in _slices(weight_VH.shape[0]):
        out_NV[:, part] = hidden_NH @ weight_VH[part].float().T
    return out_NV


def add_pull_back(out_NH: Tensor, grad_NV: Tensor, weight_VH: Tensor) -> None:
    """Adds to float32 `out_NH` the gradient at hidden of `project`: grad @ weight.

    grad_NV  in weight's dtype
    """
    if grad_NV.is_cuda and grad_NV.dtype != torch.float32:
        add_wide(out_NH, grad_NV, weight_VH)
    elif _is_native(grad_NV, weight_VH.T):
        native.add_product(out_NH, grad_NV, weight_VH)
    else:
        out_NH.addmm_(grad_NV.float(), weight_VH.float())


def add_turned(out_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor) -> None:
    """Adds to float32 `out_VH` the gradient at weight of `project`: grad.T @ hidden.

    grad_NV  in hidden's dtype
    """
    if grad_NV.is_cuda and grad_NV.dtype != torch.float32:
        add_wide(out_VH, grad_NV.T, hidden_NH)
    elif _is_native(grad_NV.T, hidden_NH.T, even=False):
        native.add_turned(out_VH, grad_NV, hidden_NH)
    else:
        out_VH.addmm_(grad_NV.T.float(), hidden_NH.float())


def add_wide(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """Adds a @ b, both of the same half precision and on CUDA, to float32 `out`: in place where
    the device can, else through a second tensor of out's size."""
    if _adds_in_place(out_MN.device, a_MK.dtype):
        torch.addmm(out_MN, a_MK, b_KN, out_dtype=torch.float32, out=out_MN)
    else:
        out_MN += torch.mm(a_MK, b_KN, out_dtype=torch.float32)


@functools.cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm widens as mm does: it came later, and to newer devices."""
    try:
        out, a = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
        return device.type == "meta" or bool((out == 17).all())
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False


def _projects_natively(hidden_NH: Tensor, weight_VH: Tensor) -> bool:
    """By the width alone, so that a part of a head is multiplied like the whole, to the bit."""
    wide = hidden_NH.dtype == torch.bfloat16 or hidden_NH.shape[1] >= _NARROW
    return wide and _is_native(hidden_NH, weight_VH, least=0)


def _is_native(a_MK: Tensor, b_NK: Tensor, even: bool = True, least: int = _SMALL) -> bool:
    if a_MK.device.type != "cpu" or a_MK.dtype != b_NK.dtype:
        return False
    (M, K), N = a_MK.shape, len(b_NK)
    # bfloat16 operands are taken in pairs; small float32 products are as well left to torch.
    half = a_MK.dtype == torch.bfloat16
    fits = K % 2 == 0 or not even if half else M * N * K >= least
    return fits and min(M, N, K) > 0 and native.supports(a_MK.dtype)


def _slices(rows: int) -> Iterator[slice]:
    return (slice(i, i + _SLICE_ROWS) for i in range(0, rows, _SLICE_ROWS))
