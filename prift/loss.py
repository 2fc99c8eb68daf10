"""Weighted linear cross-entropy: the loss of label tokens from hidden states, chunk by chunk.

    loss = sum over label tokens of w(t) * -log p(t), and of the anchor's pull where there is one

The caller divides by the label tokens of the whole optimiser step. Rows of weight zero never
reach the output projection where the weights are known beforehand (prior as source) and nothing is
anchored; no tensor of tokens x vocabulary outlives its chunk: each chunk's gradients are taken
while its logits exist.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prift.chunk import Chunk, sums_for
from prift.fold import Fold
from prift.gradients import Gradients, wide
from prift.heads import Head
from prift.stats import TokenStats
from prift.terms import Anchor, Asked, Online, Terms
from prift.weigher import Weigher
from prift.wholechunk import WholeChunk, passes

_CHUNK_BYTES = 320 << 20  # of one float32 chunk of exponentials
_CHUNK_ROWS = (64, 1024)  # fewer: each chunk's V x H accumulation dominates; more: no faster


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Result of one micro-batch of N label tokens.

    loss     float32 scalar, differentiable: the sum of weights * scale * nll + anchor * k3
    nll      float32 [N], -log p of each label token, detached; NaN where the row was not run
    weights  float32 [N], detached
    """

    loss: Tensor
    nll: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Kernel:
    """Another package's linear cross-entropy, and where it was found right (fused.choose).

    name    of the package
    nll     (hidden [N, H], head, targets int64 [N]) -> float32 nll [N], differentiable in hidden,
            the head's weight and its bias
    device  type of the device
    dtype   of hidden and weight
    """

    name: str
    nll: Callable[[Tensor, Head, Tensor], Tensor]
    device: str
    dtype: torch.dtype

    def takes(self, hidden_NH: Tensor, head: Head) -> bool:
        """Whether these are what it was tried on; no row at all is not."""
        dtypes = {hidden_NH.dtype, head.weight.dtype}
        return (
            len(hidden_NH) > 0 and hidden_NH.device.type == self.device and dtypes == {self.dtype}
        )


def weighted_loss(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    weigher: Weigher,
    prior: TokenStats | None,
    *,
    weights_N: Tensor | None = None,
    scale_N: Tensor | None = None,
    sequence_N: Tensor | None = None,
    role_N: Tensor | None = None,
    anchor: float | Tensor | None = None,
    every_nll: bool = False,
    kernel: Kernel | None = None,
) -> LossOutput:
    """Weighted cross-entropy of N label tokens.

    hidden_NH  hidden states that predict the targets [N, H]
    targets_N  int64 [N]
    prior      statistics [N] of the same tokens, where the weigher's source is the prior, where it
               compares the online model with the prior, or where there is an anchor
    weights_N  float32 [N], where they are known beforehand: the weigher is not asked
    scale_N    float32 [N], not 0: a factor of each token's loss; None: 1
    sequence_N int64 [N]: which sequence each token belongs to, for rules that ask for it
    role_N     uint8 [N]: whose words each is (prift.roles), likewise
    anchor     a factor of each token's k3 (prift.anchor); with one every row is run
    every_nll  also compute `nll` of rows whose weight is zero, without gradient
    kernel     what makes the nll and its gradient, where it takes these tensors
    """
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        bias = None if head.bias is None else head.bias.to(dtype)
        hidden_NH = hidden_NH.to(dtype)
        head = replace(head, weight=head.weight.to(dtype), bias=bias)
    prior = prior or TokenStats()
    with torch.autocast(device, enabled=False):
        if weigher.source == "online" and weights_N is None:
            weights = Online(weigher, prior, sequence_N, role_N)
            if weigher.scope != "token":
                weights = weights.all(_statistics(hidden_NH.detach(), head, targets_N))
        else:
            weights = weights_N
            if weights is None:
                weights = weigher(prior, sequence_N, role_N=role_N)
            weights = weights.to(hidden_NH.device).expand(len(targets_N))
            if anchor is None:
                return _without_zeros(
                    hidden_NH, head, targets_N, weights, scale_N, every_nll, kernel
                )
        pull = None if anchor is None else Anchor(anchor, prior.logprob.to(hidden_NH.device))
        terms = Terms(weights, scale_N, pull)
        return LossOutput(*_cross_entropy(hidden_NH, head, targets_N, terms, kernel))


def _without_zeros(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    weights_N: Tensor,
    scale_N: Tensor | None,
    every_nll: bool,
    kernel: Kernel | None,
) -> LossOutput:
    """The loss of weights that are known, of whose rows those of weight zero have no gradient."""
    nll_N = torch.full_like(weights_N, torch.nan)
    rows = weights_N.nonzero()[:, 0]
    terms = Terms(weights_N[rows], None if scale_N is None else scale_N[rows])
    loss, nll_N[rows], _ = _cross_entropy(hidden_NH[rows], head, targets_N[rows], terms, kernel)
    if every_nll:
        rest = (weights_N == 0).nonzero()[:, 0]
        terms = Terms(torch.ones_like(rest, dtype=torch.float32))
        with torch.no_grad():
            _, found, _ = _cross_entropy(hidden_NH[rest], head, targets_N[rest], terms, kernel)
        nll_N[rest] = found
    return LossOutput(loss, nll_N, weights_N)


def _cross_entropy(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    terms: Terms,
    kernel: Kernel | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll [N], weights [N])."""
    if kernel is not None and kernel.takes(hidden_NH, head):
        nll_N = kernel.nll(hidden_NH, head, targets_N)
        found_N, every = nll_N.detach(), slice(0, len(nll_N))
        with torch.no_grad():
            asked = _statistics(hidden_NH, head, targets_N)
            weights_N, value_N, slope_N = terms.rows(every, found_N, asked)
        # Its value is that of the terms, its gradient their derivative.
        loss = value_N.sum() + (slope_N * (nll_N - found_N)).sum()
        return loss, found_N, weights_N
    tensors = hidden_NH, head.weight, head.bias
    if not torch.is_grad_enabled():  # an autograd function is not told, and would make gradients
        tensors = [None if t is None else t.detach() for t in tensors]
    return _WeightedCrossEntropy.apply(*tensors, head, targets_N, terms)


class _WeightedCrossEntropy(torch.autograd.Function):
    """(loss, nll [R], weights [R]); gradients are computed in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        targets_R: Tensor,
        terms: Terms,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        R, V = len(targets_R), weight_VH.shape[0]
        nll_R = hidden_RH.new_empty(R, dtype=torch.float32)
        weights_R, values_R = torch.empty_like(nll_R), torch.empty_like(nll_R)
        grads = Gradients(
            torch.empty_like(hidden_RH, dtype=wide(hidden_RH)) if wants_hidden else None,
            hidden_RH.new_zeros(weight_VH.shape, dtype=torch.float32) if wants_weight else None,
            hidden_RH.new_zeros(V, dtype=torch.float32) if wants_bias else None,
        )
        wanted = any(ctx.needs_input_grad[:3])
        for rows in _chunks(R, V):
            h_CH, y_C = hidden_RH[rows], targets_R[rows]
            chunk = _chunk(head, h_CH, y_C, wanted, terms.needs)
            nll_R[rows] = chunk.nll_C
            found = terms.rows(rows, chunk.nll_C, chunk.stats)
            weights_R[rows], values_R[rows], slopes_C = found
            if wanted:
                grads.add(rows, chunk, slopes_C)
            del chunk, found  # before the next one's logits are made
        grads.hold(1.0)
        ctx.grads = grads.hidden_RH, grads.weight_VH, grads.bias_V
        ctx.dtypes = hidden_RH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(nll_R, weights_R)
        return values_R.sum(), nll_R, weights_R

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _nll: Tensor, _weights: Tensor):
        grad_RH, grad_VH, grad_V = ctx.grads
        ctx.grads = None  # scaled in place: this graph cannot be walked twice
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_RH is None else grad_RH.mul_(grad_loss).to(hidden_dtype),
            None if grad_VH is None else grad_VH.mul_(grad_loss).to(weight_dtype),
            None if grad_V is None else grad_V.mul_(grad_loss).to(bias_dtype),
            None,
            None,
            None,
        )


def _chunk(
    head: Head, hidden_CH: Tensor, targets_C: Tensor, keep: bool, names: Sequence[str]
) -> Chunk | WholeChunk:
    if hidden_CH.is_cuda:
        return WholeChunk(head, hidden_CH, targets_C)
    return Chunk(head, hidden_CH, targets_C, keep, names)


def _statistics(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> Asked:
    """Statistics of all rows, by a pass over the output projection of its own."""
    sums = passes("cuda").tile_sums if hidden_NH.is_cuda else sums_for(len(head.weight))[0]
    return lambda names: Fold(head, names=names, sums=sums)(hidden_NH, targets_N)


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Equal chunks: each adds to the whole gradient of the projection once."""
    fewest, most = _CHUNK_ROWS
    size = min(most, max(fewest, _CHUNK_BYTES // (4 * vocabulary)))
    size = math.ceil(rows / max(1, math.ceil(rows / size)))
    return (slice(i, i + size) for i in range(0, rows, max(1, size)))
