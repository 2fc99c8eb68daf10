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

and, computed only when asked for (`token_stats` takes whole rows for the last two,
and sorts them for expected_rank):

    collision      sum q^2                                                     float32, [1/V, 1]
    expected_rank  sum q(v) rank(v)                                            float32, [1, V]
    entropy_top20  entropy of the 20 (or V) most probable tokens, renormalised float32, [0, log 20]

<, = and > are decided on the logits: probabilities underflow. log u is stored, not u or the mass
above, because near either end only the logarithm keeps its digits.

Everything in the core is made of five sums over the vocabulary (`tile_sums`), which can be taken
tile by tile: that is what fold.py does without ever holding a row. This module knows tensors of
logits; it knows no model, no text and no file.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prift.extended import TILE, WHOLE_ROW, row_sum

CORE = ("logprob", "log_mass_rank", "rank", "n_tie", "entropy")
EXTENDED = ("collision", "expected_rank", "entropy_top20")
STATISTICS = {"core": CORE, "extended": CORE + EXTENDED}
"""--statistics: what each choice stores."""

DEEP = -60.0  # below this z(y) - reference, exp() of the target side is recomputed around z(y)
_BLOCK = 1 << 18  # logits handled at once on a CPU: a block and its two copies stay in its cache


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of N tokens, each field a tensor [N] or None where it was not computed.

    A row of logits that is no distribution (NaN, +inf, nothing but -inf) has a NaN logprob.
    """

    logprob: Tensor | None = None
    log_mass_rank: Tensor | None = None
    rank: Tensor | None = None
    n_tie: Tensor | None = None
    entropy: Tensor | None = None
    collision: Tensor | None = None
    expected_rank: Tensor | None = None
    entropy_top20: Tensor | None = None

    def map(self, function) -> "TokenStats":
        """The same statistics with `function` applied to every tensor present."""
        return TokenStats(**{n: function(getattr(self, n)) for n in self.names()})

    def names(self) -> tuple[str, ...]:
        """Names of the statistics present."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def put(self, rows: Tensor, other: "TokenStats") -> None:
        """Overwrites these rows (int64 [M]) with the statistics [M] of `other`."""
        for name in self.names():
            getattr(self, name)[rows] = getattr(other, name)

    def check(self) -> "TokenStats":
        """Itself. Raises NotADistribution for the first row that is none."""
        bad = self.logprob.isnan().nonzero()
        if len(bad):
            raise NotADistribution(int(bad[0]))
        return self

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


def tile_sums(
    z_RC: Tensor,
    target_R1: Tensor,
    reference_R1: Tensor,
    squares: bool,
    out_RC: Tensor | None = None,
) -> Tensor:
    """float64 [5 or 6, R]: sums over the columns of a tile, with e = exp(z - reference).

        0  sum of e over z > target        3  how many z > target
        1  sum of e over z <= target       4  how many z >= target
        2  sum of e * (z - reference)      5  sum of e^2, with `squares`

    z_RC          logits, float32 or bfloat16; at most TILE columns keep float32's digits
    target_R1     float32 [R, 1], z(y)
    reference_R1  float32 [R, 1], not far below the row's largest logit, so that e stays finite
    out_RC        float32, where e is written

    Masks are floats in reused memory, several times faster than bools where nothing fuses them;
    torch.compile makes one pass of it all.
    """
    z_RC = z_RC.float()
    shifted_RC = z_RC - reference_R1
    e_RC = torch.exp(shifted_RC, out=out_RC)
    moment = shifted_RC.clamp_min_(-1e4).mul_(e_RC).sum(1)  # -inf would give 0 * inf
    mask_RC = torch.gt(z_RC, target_R1, out=shifted_RC)
    num_above = mask_RC.sum(1)
    squared = [(e_RC * e_RC).sum(1)] if squares else []
    above = mask_RC.mul_(e_RC).sum(1)
    # What is left at or below the target: nothing cancels.
    below = torch.sub(e_RC, mask_RC, out=mask_RC).sum(1)
    num_reaching = torch.ge(z_RC, target_R1, out=mask_RC).sum(1)
    return torch.stack([above, below, moment, num_above, num_reaching, *squared]).double()


def stats_of_sums(
    sums: Tensor, target_R: Tensor, reference_R: Tensor, vocabulary: int
) -> TokenStats:
    """Statistics from the sums over the whole vocabulary.

    sums  float64 [5 or 6, R] of `tile_sums`; target_R, reference_R as there, float32 [R]

    log_mass_rank has no digits where z(y) lies more than -DEEP below the reference: see `is_deep`.
    """
    above, below, moment, num_above, num_reaching = sums[:5]
    total = above + below
    logprob = (target_R.double() - reference_R) - total.log()  # a difference of float32, exact
    rank = 1 + num_above
    # Both forms are exact; each keeps relative precision at its own end.
    share = above / total
    log_mass = torch.where(share < 0.5, torch.log1p(-share), (below / total).log())
    log_mass = _ordered(log_mass, rank)
    return TokenStats(
        logprob=logprob.clamp_max(0).float(),
        log_mass_rank=log_mass.float(),
        rank=rank.int(),
        n_tie=(num_reaching - num_above).int(),
        entropy=(total.log() - moment / total).clamp(0, math.log(vocabulary)).float(),
        collision=(sums[5] / total**2).clamp(1 / vocabulary, 1).float() if len(sums) > 5 else None,
    )


def is_deep(target_R: Tensor, reference_R: Tensor) -> Tensor:
    """bool [R]: where the mass at or below the target underflows around the reference."""
    return ~(target_R - reference_R > DEEP)


@torch.no_grad()
def token_stats(
    logits_NV: Tensor,
    targets_N: Tensor,
    names: Sequence[str] = CORE,
    *,
    block_rows: int | None = None,
    sums: Callable[..., Tensor] = tile_sums,
) -> TokenStats:
    """The core statistics of each row of logits for its target, and those of EXTENDED in `names`.

    logits_NV  float tensor [N, V], compared and exponentiated in float32; -inf is allowed.
    targets_N  int64 [N], ids in [0, V).
    block_rows rows handled at once; default: as many as keep a block inside the CPU's cache.
    sums       `tile_sums`, or what a compiler made of it

    Rows that are no distribution have a NaN logprob: see `TokenStats.check`. None of the statistics
    carries a gradient.
    """
    N, V = logits_NV.shape
    if block_rows is None:
        block_rows = max(1, N if logits_NV.is_cuda else _BLOCK // min(V, TILE))
    blocks = [
        _block_stats(logits_NV[i : i + block_rows], targets_N[i : i + block_rows], names, sums)
        for i in range(0, max(N, 1), block_rows)
    ]
    return TokenStats.concatenate(blocks)


def _block_stats(
    z_RV: Tensor, y_R: Tensor, names: Sequence[str], sums: Callable[..., Tensor]
) -> TokenStats:
    V = z_RV.shape[1]
    width = V if z_RV.is_cuda else TILE  # a GPU sums as a tree, and wants few launches
    top_R1 = z_RV.amax(1, keepdim=True).float()
    target_R1 = z_RV.gather(1, y_R[:, None]).float()
    squares = "collision" in names
    total = sum(
        sums(z_RV[:, i : i + width], target_R1, top_R1, squares) for i in range(0, V, width)
    )
    target_R, top_R = target_R1[:, 0], top_R1[:, 0]
    stats = stats_of_sums(total, target_R, top_R, V)
    deep = (is_deep(target_R, top_R) & (target_R > -torch.inf)).nonzero()[:, 0]
    if len(deep):
        ratio = _log_mass_ratio(z_RV[deep].float(), target_R1[deep])
        exact = (target_R - top_R)[deep].double() - (total[0] + total[1])[deep].log() + ratio
        stats.log_mass_rank[deep] = _ordered(exact, stats.rank[deep]).float()
    stats.log_mass_rank.masked_fill_(target_R == -torch.inf, -torch.inf)
    extended = {n: WHOLE_ROW[n](z_RV.float(), top_R1) for n in names if n in WHOLE_ROW}
    return TokenStats(**{n: getattr(stats, n) for n in stats.names()} | extended)


def _ordered(log_mass_R: Tensor, rank_R: Tensor) -> Tensor:
    """Exactly 0 at rank 1, and below 0 everywhere else."""
    below_R = log_mass_R.clamp_max(-torch.finfo(torch.float32).tiny)
    return torch.where(rank_R == 1, 0.0, below_R)


def _log_mass_ratio(z_RV: Tensor, target_R1: Tensor) -> Tensor:
    """float64: log(u / q(y)) where both underflow, the log of the sum of exp(z - z(y)) over
    z <= z(y)."""
    ratio_RV = (z_RV - target_R1).exp_()  # +inf above the target, which the mask removes
    return row_sum(ratio_RV.masked_fill_(z_RV > target_R1, 0)).log()
