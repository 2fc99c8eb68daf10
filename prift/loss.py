"""Weighted linear cross-entropy: the loss of label tokens from hidden states, chunk by chunk.

    loss = sum over label tokens of w(t) * -log p(t)

The caller divides by the label tokens of the whole optimiser step. Rows of weight zero never
reach the output projection where the weights are known beforehand (prior as source); no tensor of
tokens x vocabulary outlives its chunk: each chunk's gradients are taken while its logits exist.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prift.chunk import Chunk
from prift.fold import Fold
from prift.heads import Head
from prift.products import add_pull_back, add_turned
from prift.stats import TokenStats
from prift.weigher import Weigher

_CHUNK_BYTES = 320 << 20  # of one float32 chunk of exponentials
_CHUNK_ROWS = (64, 1024)  # fewer: each chunk's V x H accumulation dominates; more: no faster


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Result of one micro-batch of N label tokens.

    loss     float32 scalar, differentiable: the sum of weights * scale * nll
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
    every_nll: bool = False,
    kernel: Kernel | None = None,
) -> LossOutput:
    """Weighted cross-entropy of N label tokens.

    hidden_NH  hidden states that predict the targets [N, H]
    targets_N  int64 [N]
    prior      statistics [N] of the same tokens, where the weigher's source is the prior, or where
               it compares the online model with the prior
    weights_N  float32 [N], where they are known beforehand: the weigher is not asked
    scale_N    float32 [N], not 0: a factor of each token's loss; None: 1
    sequence_N int64 [N]: which sequence each token belongs to, for rules that ask for it
    role_N     uint8 [N]: whose words each is (prift.roles), likewise
    every_nll  also compute `nll` of rows whose weight is zero, without gradient
    kernel     what makes the nll and its gradient, where it takes these tensors
    """
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        bias = None if head.bias is None else head.bias.to(dtype)
        hidden_NH = hidden_NH.to(dtype)
        head = replace(head, weight=head.weight.to(dtype), bias=bias)
    with torch.autocast(device, enabled=False):
        if weigher.source == "online" and weights_N is None:
            weights = _Online(weigher, prior or TokenStats(), sequence_N, role_N, scale_N)
            if weigher.scope != "token":
                weights = weights.all(hidden_NH.detach(), head, targets_N)
            out = LossOutput(*_cross_entropy(hidden_NH, head, targets_N, weights, kernel))
            return out if scale_N is None else replace(out, weights=out.weights / scale_N)
        if weights_N is None:
            weights_N = weigher(prior or TokenStats(), sequence_N, role_N=role_N)
        weights_N = weights_N.to(hidden_NH.device).expand(len(targets_N))
        nll_N = torch.full_like(weights_N, torch.nan)
        rows = weights_N.nonzero()[:, 0]
        scaled = weights_N[rows] if scale_N is None else weights_N[rows] * scale_N[rows]
        loss, nll_N[rows], _ = _cross_entropy(
            hidden_NH[rows], head, targets_N[rows], scaled, kernel
        )
        if every_nll:
            rest = (weights_N == 0).nonzero()[:, 0]
            ones = torch.ones_like(rest, dtype=torch.float32)
            with torch.no_grad():
                _, found, _ = _cross_entropy(hidden_NH[rest], head, targets_N[rest], ones, kernel)
            nll_N[rest] = found
        return LossOutput(loss, nll_N, weights_N)


@dataclass(frozen=True, slots=True)
class _Online:
    """What weighs tokens by what the model in training thinks of them, times their scale. For the
    arguments see weighted_loss."""

    weigher: Weigher
    prior: TokenStats
    sequence_N: Tensor | None
    role_N: Tensor | None
    scale_N: Tensor | None

    def rows(self, rows: slice, head: Head, h_CH: Tensor, y_C: Tensor, nll_C: Tensor) -> Tensor:
        """Weights [C] of these rows. Of the statistics the logprob alone is known already; for
        more the logits are made once more, since ties and ranks need them unrounded."""
        if set(self.weigher.needs) <= {"logprob"}:
            stats = TokenStats(logprob=(-nll_C).clamp_max(0))
        else:
            stats = Fold(head, names=self.weigher.needs)(h_CH, y_C)
        sequence_C, role_C = (
            None if values is None else values[rows] for values in (self.sequence_N, self.role_N)
        )
        base = self.prior.map(lambda values: values[rows].to(h_CH.device))
        scale = 1.0 if self.scale_N is None else self.scale_N[rows]
        return self.weigher(stats, sequence_C, base, role_C).expand(len(y_C)) * scale

    @torch.no_grad()
    def all(self, hidden_NH: Tensor, head: Head, targets_N: Tensor) -> Tensor:
        """Weights [N] of rules that look at many tokens: a pass over the chunks of its own."""
        stats = Fold(head, names=self.weigher.needs)(hidden_NH, targets_N)
        base = self.prior.map(lambda values: values.to(hidden_NH.device))
        scale = 1.0 if self.scale_N is None else self.scale_N
        found = self.weigher(stats, self.sequence_N, base, self.role_N)
        return found.expand(len(targets_N)) * scale


def _cross_entropy(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    weights: Tensor | _Online,
    kernel: Kernel | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll [N], weights [N])."""
    if kernel is not None and kernel.takes(hidden_NH, head):
        nll_N = kernel.nll(hidden_NH, head, targets_N)
        if not isinstance(weights, Tensor):
            with torch.no_grad():
                every = slice(0, len(nll_N))
                weights = weights.rows(every, head, hidden_NH, targets_N, nll_N)
        return (nll_N * weights).sum(), nll_N.detach(), weights
    tensors = hidden_NH, head.weight, head.bias
    if not torch.is_grad_enabled():  # an autograd function is not told, and would make gradients
        tensors = [None if t is None else t.detach() for t in tensors]
    return _WeightedCrossEntropy.apply(*tensors, head, targets_N, weights)


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
        weights: Tensor | _Online,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        R, V = len(targets_R), weight_VH.shape[0]
        nll_R = hidden_RH.new_empty(R, dtype=torch.float32)
        weights_R = torch.empty_like(nll_R)
        grads = _Gradients(
            torch.empty_like(hidden_RH) if wants_hidden else None,
            hidden_RH.new_zeros(weight_VH.shape, dtype=torch.float32) if wants_weight else None,
            hidden_RH.new_zeros(V, dtype=torch.float32) if wants_bias else None,
        )
        wanted = any(ctx.needs_input_grad[:3])
        for rows in _chunks(R, V):
            h_CH, y_C = hidden_RH[rows], targets_R[rows]
            chunk = Chunk(head, h_CH, y_C, keep=wanted)
            nll_R[rows] = chunk.nll_C
            if isinstance(weights, Tensor):
                weights_R[rows] = weights[rows]
            else:
                weights_R[rows] = weights.rows(rows, head, h_CH, y_C, nll_R[rows])
            if wanted:
                grads.add(rows, chunk, weights_R[rows])
        ctx.grads = grads.hidden_RH, grads.weight_VH, grads.bias_V
        ctx.dtypes = weight_VH.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(nll_R, weights_R)
        return (nll_R * weights_R).sum(), nll_R, weights_R

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _nll: Tensor, _weights: Tensor):
        grad_RH, grad_VH, grad_V = ctx.grads
        ctx.grads = None  # scaled in place: this graph cannot be walked twice
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_RH is None else grad_RH.mul_(grad_loss),
            None if grad_VH is None else grad_VH.mul_(grad_loss).to(weight_dtype),
            None if grad_V is None else grad_V.mul_(grad_loss).to(bias_dtype),
            None,
            None,
            None,
        )


@dataclass(frozen=True, slots=True)
class _Gradients:
    """What is summed up over chunks; None where nobody needs it.

    hidden_RH in hidden's dtype; weight_VH, bias_V float32
    """

    hidden_RH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    def add(self, rows: slice, chunk: Chunk, weights_C: Tensor) -> None:
        """The gradients of sum(weights * nll) over one chunk's rows."""
        h_CH = chunk.hidden_CH
        grad_CH = torch.zeros_like(h_CH, dtype=torch.float32)
        for tile, g_CT in chunk.gradients(weights_C):
            if self.bias_V is not None:
                self.bias_V[tile] += g_CT.sum(0)
            g_CT = g_CT.to(h_CH.dtype)
            if self.hidden_RH is not None:
                add_pull_back(grad_CH, g_CT, chunk.head.weight[tile])
            if self.weight_VH is not None:
                add_turned(self.weight_VH[tile], g_CT, h_CH)
        if self.hidden_RH is not None:
            self.hidden_RH[rows] = grad_CH


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Equal chunks: each adds to the whole gradient of the projection once."""
    fewest, most = _CHUNK_ROWS
    size = min(most, max(fewest, _CHUNK_BYTES // (4 * vocabulary)))
    size = math.ceil(rows / max(1, math.ceil(rows / size)))
    return (slice(i, i + size) for i in range(0, rows, max(1, size)))
