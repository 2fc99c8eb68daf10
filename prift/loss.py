"""Weighted linear cross-entropy: the loss of label tokens from hidden states, chunk by chunk.

    loss = sum over label tokens of w(t) * -log p(t)

The caller divides by the label tokens of the whole optimiser step. Rows of weight zero never
reach the output projection where the weights are known beforehand (prior as source); no tensor of
tokens x vocabulary outlives its chunk: each chunk's gradients are taken while its logits exist.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prift.heads import Head
from prift.products import accumulate, pull_back
from prift.rules import Weigher
from prift.stats import TokenStats, token_stats

_CHUNK_BYTES = 256 << 20  # of one float32 chunk of logits
_CHUNK_ROWS = (64, 1024)  # fewer: each chunk's V x H accumulation dominates; more: no faster


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Result of one micro-batch of N label tokens.

    loss     float32 scalar, differentiable: the sum of weights * nll
    nll      float32 [N], -log p of each label token, detached; NaN where the row was not run
    weights  float32 [N], detached
    """

    loss: Tensor
    nll: Tensor
    weights: Tensor


def weighted_loss(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    weigher: Weigher,
    prior: TokenStats | None,
    *,
    every_nll: bool = False,
) -> LossOutput:
    """Weighted cross-entropy of N label tokens.

    hidden_NH  hidden states that predict the targets [N, H]
    targets_N  int64 [N]
    prior      statistics [N] of the same tokens, where the weigher's source is the prior
    every_nll  also compute `nll` of rows whose weight is zero, without gradient
    """
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        bias = None if head.bias is None else head.bias.to(dtype)
        hidden_NH = hidden_NH.to(dtype)
        head = replace(head, weight=head.weight.to(dtype), bias=bias)
    with torch.autocast(device, enabled=False):
        if weigher.source == "online":
            return LossOutput(*_cross_entropy(hidden_NH, head, targets_N, weigher))
        weights_N = weigher(prior or TokenStats()).to(hidden_NH.device).expand(len(targets_N))
        nll_N = torch.full_like(weights_N, torch.nan)
        rows = weights_N.nonzero()[:, 0]
        loss, nll_N[rows], _ = _cross_entropy(
            hidden_NH[rows], head, targets_N[rows], weights_N[rows]
        )
        if every_nll:
            rest = (weights_N == 0).nonzero()[:, 0]
            ones = torch.ones_like(rest, dtype=torch.float32)
            with torch.no_grad():
                nll_N[rest] = _cross_entropy(hidden_NH[rest], head, targets_N[rest], ones)[1]
        return LossOutput(loss, nll_N, weights_N)


def _cross_entropy(
    hidden_NH: Tensor, head: Head, targets_N: Tensor, weights: Tensor | Weigher
) -> tuple[Tensor, Tensor, Tensor]:
    return _WeightedCrossEntropy.apply(hidden_NH, head.weight, head.bias, head, targets_N, weights)


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
        weights: Tensor | Weigher,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        R, V = len(targets_R), weight_VH.shape[0]
        nll_R = hidden_RH.new_empty(R, dtype=torch.float32)
        weights_R = torch.empty_like(nll_R)
        grad_RH = torch.empty_like(hidden_RH) if wants_hidden else None
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        grad_V = hidden_RH.new_zeros(V, dtype=torch.float32) if wants_bias else None
        for rows in _chunks(R, V):
            h_CH, y_C = hidden_RH[rows], targets_R[rows]
            z_CV = head.logits(h_CH)
            lse_C1 = z_CV.logsumexp(1, keepdim=True)
            nll_R[rows] = (lse_C1 - z_CV.gather(1, y_C[:, None]))[:, 0]
            if isinstance(weights, Tensor):
                weights_R[rows] = weights[rows]
            else:
                weights_R[rows] = weights(_online_stats(z_CV, y_C, nll_R[rows], weights))
            if not any(ctx.needs_input_grad[:3]):
                continue
            g_CV = z_CV.sub(lse_C1).exp_() if head.softcap else z_CV.sub_(lse_C1).exp_()
            g_CV[torch.arange(len(y_C), device=y_C.device), y_C] -= 1
            g_CV = head.chain(g_CV.mul_(weights_R[rows, None]), z_CV)
            if wants_hidden:
                grad_RH[rows] = pull_back(g_CV, weight_VH)
            if wants_weight:
                accumulate(grad_VH, g_CV, h_CH)
            if wants_bias:
                grad_V += g_CV.sum(0)
        ctx.grads = grad_RH, grad_VH, grad_V
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


def _online_stats(z_CV: Tensor, y_C: Tensor, nll_C: Tensor, weigher: Weigher) -> TokenStats:
    """What the rule needs of the model in training; the logprob alone is known already."""
    if set(weigher.rule.needs) <= {"logprob"}:
        return TokenStats(logprob=(-nll_C).clamp_max(0))
    return token_stats(z_CV, y_C, weigher.rule.needs).check()


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    fewest, most = _CHUNK_ROWS
    size = min(most, max(fewest, _CHUNK_BYTES // (4 * vocabulary)))
    return (slice(i, i + size) for i in range(0, rows, size))
