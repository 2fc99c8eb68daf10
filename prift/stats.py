"""What a model thought of each token: the definition of every statistic, and its computation.

q is the model's distribution over its whole output vocabulary at one position, z its float32
logits, y the token that follows. Natural logarithms. The mass rank is the cumulative-mass score
of PriFT (arXiv 2606.09396): PriFT-mass keeps a token when u >= tau.

    logprob        log q(y)                                                    float32, <= 0
    log_mass_rank  log u, u = sum of q(v) over v with z(v) <= z(y), y included float32, <= 0;
                   exactly 0 if and only if rank = 1
    rank           1 + number of v with z(v) > z(y)                            int32, >= 1
    n_tie          number of v with z(v) = z(y), y included                    int32, >= 1
    entropy        -sum q log q, with 0 log 0 = 0                              float32, [0, log V]

<, = and > are decided on the logits: probabilities underflow. log u is stored, not u or the mass
above, because near either end only the logarithm keeps its digits. This module knows tensors of
logits; it knows no model, no text and no file.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

STATS_VERSION = 1
"""Raised when the definition of an existing statistic changes, never when one is added."""

CORE = ("logprob", "log_mass_rank", "rank", "n_tie", "entropy")
INTEGERS = frozenset({"rank", "n_tie"})

_TILE = 8192  # columns summed in float32 before sums are joined: longer float32 sums lose digits
_UNDERFLOW = -60.0  # below this z(y) - max, exp() of the target side is recomputed around z(y)


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of N tokens, each field a tensor [N] or None where it was not computed."""

    logprob: Tensor | None = None
    log_mass_rank: Tensor | None = None
    rank: Tensor | None = None
    n_tie: Tensor | None = None
    entropy: Tensor | None = None

    def map(self, function) -> "TokenStats":
        """The same statistics with `function` applied to every tensor present."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return TokenStats(**{k: None if v is None else function(v) for k, v in values.items()})

    def names(self) -> tuple[str, ...]:
        """Names of the statistics present."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @staticmethod
    def concatenate(parts: Iterable["TokenStats"]) -> "TokenStats":
        """Statistics of all parts, in order. Parts must hold the same names."""
        parts = list(parts)
        names = parts[0].names()
        return TokenStats(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


class NotADistribution(ValueError):
    """Logits with NaN or +inf, or nothing but -inf. `row` is the first such row."""

    def __init__(self, row: int):
        super().__init__(f"logits of row {row} are not a distribution (NaN, +inf, or all -inf)")
        self.row = row


def token_stats(logits_NV: Tensor, targets_N: Tensor, block_rows: int | None = None) -> TokenStats:
    """Core statistics of each row of logits for its target.

    logits_NV  float tensor [N, V], compared and exponentiated in float32; -inf is allowed.
    targets_N  int64 [N], ids in [0, V).
    block_rows rows handled at once; default: as many as keep a block inside the CPU's cache.

    Raises NotADistribution for NaN, +inf or all--inf rows.
    """
    N, V = logits_NV.shape
    if block_rows is None:
        block_rows = N if logits_NV.is_cuda else max(1, (1 << 20) // V)
    size = max(1, min(block_rows, N))
    scratch_3RV = torch.empty(3, size, V, dtype=torch.float32, device=logits_NV.device)
    blocks = []
    for i in range(0, N, size):
        z_RV, y_R = logits_NV[i : i + size].float(), targets_N[i : i + size]
        blocks.append(_block_stats(z_RV, y_R, scratch_3RV[:, : len(z_RV)], i))
    if not blocks:
        one = _block_stats(scratch_3RV[0].zero_(), targets_N.new_zeros(1), scratch_3RV[:, :1], 0)
        return one.map(lambda x: x[:0])
    return TokenStats.concatenate(blocks)


def _block_stats(z_RV: Tensor, y_R: Tensor, scratch_3RV: Tensor, first_row: int) -> TokenStats:
    """Statistics of a block. Masks are floats in reused memory: several times faster than bools."""
    V = z_RV.shape[1]
    top_R = z_RV.amax(1, keepdim=True)
    if not torch.isfinite(top_R).all():
        raise NotADistribution(first_row + int((~torch.isfinite(top_R[:, 0])).nonzero()[0]))
    target_R = z_RV.gather(1, y_R[:, None])
    e_RV, part_RV, shifted_RV = scratch_3RV
    n_tie = _row_sum(torch.eq(z_RV, target_R, out=part_RV))
    rank = 1 + V - _row_sum(torch.le(z_RV, target_R, out=part_RV))

    torch.sub(z_RV, top_R, out=shifted_RV)
    shifted_RV.clamp_min_(-1e4)  # -inf would give 0 * inf below; exp(-1e4) is 0
    torch.exp(shifted_RV, out=e_RV)
    moment = _row_sum(shifted_RV.mul_(e_RV))
    part_RV.mul_(e_RV)  # of tokens at or below the target; what is left is above: no subtraction
    below, above = _row_sum(part_RV), _row_sum(e_RV.sub_(part_RV))
    total = below + above

    gap = (target_R - top_R)[:, 0].double()  # float32 values, so exact
    logprob = gap - total.log()
    # Both forms are exact; each keeps relative precision at its own end.
    share = above / total
    log_mass = torch.where(share < 0.5, torch.log1p(-share), (below / total).log())
    deep = ((gap < _UNDERFLOW) & (target_R[:, 0] > -torch.inf)).nonzero()[:, 0]
    if deep.numel():
        log_mass[deep] = logprob[deep] + _log_mass_ratio(z_RV[deep], target_R[deep])
    log_mass = torch.where(target_R[:, 0] == -torch.inf, -torch.inf, log_mass)
    log_mass = torch.where(rank == 1, 0.0, log_mass.clamp_max(-torch.finfo(torch.float32).tiny))
    return TokenStats(
        logprob=logprob.clamp_max(0).float(),
        log_mass_rank=log_mass.float(),
        rank=rank.int(),
        n_tie=n_tie.int(),
        entropy=(total.log() - moment / total).clamp(0, math.log(V)).float(),
    )


def _log_mass_ratio(z_RV: Tensor, target_R1: Tensor) -> Tensor:
    """log(u / q(y)) where both underflow: log of the sum of exp(z - z(y)) over z <= z(y)."""
    ratio_RV = (z_RV - target_R1).exp_()  # +inf above the target, which the mask removes
    return _row_sum(ratio_RV.masked_fill_(z_RV > target_R1, 0)).log()


def _row_sum(x_RV: Tensor) -> Tensor:
    """Row sums in float64 of float32 partial sums over tiles of the vocabulary."""
    whole = x_RV.shape[1] // _TILE * _TILE
    rest = x_RV[:, whole:].sum(1, dtype=torch.float32).double()
    if not whole:
        return rest
    return rest + x_RV[:, :whole].unflatten(1, (-1, _TILE)).sum(2).double().sum(1)
