"""Rules that compare two distributions: what `stats` (the source) and `base` thought of a token.

With the online model as source, base is the prior: ratios p / q. With a prior as source, base is a
second prior (`--prior A --prior B`): ratios q_A / q_B. The signature is a rule's options, the
docstring its formula and source.
"""

import math

import torch
from torch import Tensor

from prift.errors import OptionError
from prift.rules import largest
from prift.stats import TokenStats
from prift.weigher import rule

ONE = ("logprob",)


@rule("iw-sft", needs=ONE, base=ONE)
def iw_sft(stats: TokenStats, base: TokenStats, *, low: float = 0.2, high: float = 1.8) -> Tensor:
    """w = p(y) / q(y) held within [low, high]: iw-SFT per token (arXiv 2507.12856), p being the
    source's and q the base's."""
    _ordered(low=low, high=high)
    return _log_ratio(stats, base).exp().clamp(low, high)


@rule("iw-sft-sequence", needs=ONE, base=ONE, scope="sequence")
def iw_sft_sequence(
    stats: TokenStats,
    base: TokenStats,
    sequence_N: Tensor,
    *,
    temperature: float = 1.0,
    most: float = 16.0,
) -> Tensor:
    """w = exp(temperature * mean over the sequence of log p(y) - log q(y)) held within [0, most]:
    iw-SFT per sequence (arXiv 2507.12856)."""
    _ordered(least=0.0, most=most)
    if not math.isfinite(temperature):
        raise OptionError(f"--rule-arg temperature={temperature}: wanted a finite factor.")
    ratio_N = _log_ratio(stats, base)
    own, counts = _groups(sequence_N)
    means = torch.zeros_like(counts).index_add_(0, own, ratio_N.double()) / counts
    return torch.exp(temperature * means).clamp_max(most).float()[own]


@rule("psft", needs=ONE, base=ONE)
def psft(stats: TokenStats, base: TokenStats, *, high: float = 0.28) -> Tensor:
    """w = r where r = p(y) / q(y) < 1 + high, else 0: the gradient of the clipped objective of PSFT
    (arXiv 2508.17784) with advantage 1.

    PSFT's q is the model of some steps before; here it is the frozen prior, which is another
    method: its trust region does not move along.
    """
    ratio_N = _log_ratio(stats, base).exp()
    return torch.where(ratio_N < 1 + high, ratio_N, 0.0)


@rule("pear", needs=ONE, base=ONE, scope="sequence")
def pear(
    stats: TokenStats,
    base: TokenStats,
    sequence_N: Tensor,
    *,
    discount: float = 0.999,
    low: float = 0.1,
    high: float = 10.0,
    least_log: float = -0.08,
    most_log: float = 0.3,
) -> Tensor:
    """w = d^(T - t) * product over later tokens j of r(j), held within [low, high]: PEAR per token
    (arXiv 2602.01058).

    r = p(y) / q(y), its logarithm held within [least_log, most_log]; t counts the sequence's label
    tokens and T is the last; d = discount. q must be the model that generated the data. The bounds
    low and high are those of a third party's implementation, which says that the paper has exp(-10)
    and exp(5); the authors' code could not be read.
    """
    if not 0 < discount <= 1:
        raise OptionError(f"--rule-arg discount={discount}: wanted a factor above 0, 1 at most.")
    _ordered(low=low, high=high)
    _ordered(least_log=least_log, most_log=most_log)
    steps_N = _log_ratio(stats, base).double().clamp(least_log, most_log) + math.log(discount)
    own, counts = _groups(sequence_N)
    order = own.argsort(stable=True)
    sums = steps_N[order].cumsum(0)
    ends = counts.long().cumsum(0) - 1
    later = torch.empty_like(sums)
    later[order] = sums[ends][own[order]] - sums
    return later.exp().clamp(low, high).float()


@rule("rho-1", needs=ONE, base=ONE, scope="batch")
def rho_1(stats: TokenStats, base: TokenStats, *, keep: float = 0.6) -> Tensor:
    """w = 1 for the share `keep` of tokens with the largest excess loss log q(y) - log p(y), else
    0: Rho-1 (arXiv 2404.07965), p being the source's and q the base's, the reference model."""
    return largest(-_log_ratio(stats, base), _share(keep))


@rule("token-cleaning", needs=ONE, base=ONE, scope="batch")
def token_cleaning(stats: TokenStats, base: TokenStats, *, keep: float = 0.6) -> Tensor:
    """w = 1 for the share `keep` of tokens with the largest score log p(y) - log q(y), else 0:
    Token Cleaning (arXiv 2502.01968), p being the source's, a reference model fine-tuned on good
    data, and q the base's, the model it was made of."""
    return largest(_log_ratio(stats, base), _share(keep))


def _log_ratio(stats: TokenStats, base: TokenStats) -> Tensor:
    """log p(y) - log q(y); 0 where neither gives y any chance."""
    neither = stats.logprob.isneginf() & base.logprob.isneginf()
    return torch.where(neither, 0.0, stats.logprob - base.logprob)


def _groups(sequence_N: Tensor) -> tuple[Tensor, Tensor]:
    """(number of each token's sequence among those there are, float64 tokens of each)."""
    _, own = sequence_N.unique(return_inverse=True)
    return own, own.bincount().double()


def _ordered(**bounds: float) -> None:
    (below, low), (above, high) = bounds.items()
    if not low <= high:
        raise OptionError(f"--rule-arg {above}={high} is below {below}={low}.")


def _share(keep: float) -> float:
    if not 0 <= keep <= 1:
        raise OptionError(f"--rule-arg keep={keep}: wanted a share, in [0, 1].")
    return keep
