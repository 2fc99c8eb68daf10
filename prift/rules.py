"""Weights from the statistics of one distribution: one small function per rule.

Each is a rule for either source: q(y), H, R and u are the frozen prior's or the online model's. The
signature is its options, the docstring its formula and source. Rules that compare two distributions
are in comparing.py. The caller takes care that no gradient flows through weights.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from prift.errors import OptionError
from prift.roles import ANSWERS
from prift.stats import TokenStats
from prift.weigher import rule

TENTHS = tuple(i / 10 for i in range(1, 10))
PROBABILITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)
NATS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


@rule("uniform", needs=())
def uniform(stats: TokenStats) -> Tensor:
    """w = 1, a scalar: ordinary supervised fine-tuning."""
    return torch.ones(())


@rule("prob", needs=("logprob",))
def prob(stats: TokenStats, *, power: float = 1.0) -> Tensor:
    """w = q(y)^power, in [0, 1].

    From the prior: PriFT-prob (arXiv 2606.09396). From the online model: DFT (arXiv 2508.05629),
    and with another power the gradient of the loss (1 - p^power) / power (arXiv 2510.00526).
    """
    _check("power", power, 0, math.inf, "a finite power of 0 or more")
    return torch.exp(power * stats.logprob) if power else torch.ones_like(stats.logprob)


@rule("mass", needs=("logprob", "log_mass_rank", "n_tie"), cuts={"threshold": TENTHS})
def mass(
    stats: TokenStats,
    *,
    threshold: float = 0.5,
    ties: Literal["paper", "official-code"] = "paper",
) -> Tensor:
    """w = 1 where u >= threshold, else 0: PriFT-mass (arXiv 2606.09396).

    u is the probability mass of all tokens at most as likely as y, y included. With
    ties='official-code' tokens exactly as likely as y do not count, as in the authors' code
    (wang-kee/PriFT, prift_weights.py): u - (n_tie - 1) q(y), taken in float64.
    """
    _check("threshold", threshold, 0, 1, "a probability mass, in [0, 1]")
    if ties == "paper":
        bound = torch.tensor(threshold, dtype=torch.float64).log().float()
        return (stats.log_mass_rank >= bound).float()
    q_N = stats.logprob.double().exp()
    score_N = stats.log_mass_rank.double().exp() - (stats.n_tie.double() - 1) * q_N
    return (score_N >= threshold).float()


@rule("threshold", needs=("logprob",), cuts={"low": PROBABILITIES, "high": PROBABILITIES})
def threshold(stats: TokenStats, *, low: float = 0.1, high: float = 1.0) -> Tensor:
    """w = 1 where low <= q(y) <= high, else 0: ProFit (arXiv 2601.09195).

    Its 'higher' is low=t, its 'lower' low=0 and high=t, its 'middle' both.
    """
    return _between(stats.logprob, low, high)


@rule("prob-threshold", needs=("logprob",), cuts={"low": PROBABILITIES, "high": PROBABILITIES})
def prob_threshold(stats: TokenStats, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """w = q(y) where low <= q(y) <= high, else 0, in [0, 1].

    Online, the gradient of the thresholded losses 1 - p of arXiv 2510.00526: OnlyTopP is low=t,
    OnlyBottomP is high=t. The same thresholds on -log p are the rule threshold.
    """
    return torch.exp(stats.logprob) * _between(stats.logprob, low, high)


@rule("wit", needs=())
def wit(stats: TokenStats, role_N: Tensor, *, prompt: float = 0.0, response: float = 1.0) -> Tensor:
    """w = response where y is a response's token (or an assistant's), else prompt: WIT
    (arXiv 2507.07817), its lambda_r and lambda_p.

    Prompts have a weight where they are label tokens (--labels all). The loss in the authors' code
    (kowndinya-renduchintala/WIT) is a sum over tokens, not a mean.
    """
    for name, value in (("prompt", prompt), ("response", response)):
        _check(name, value, 0, math.inf, "a finite weight of 0 or more")
    answers = torch.isin(role_N, torch.tensor(ANSWERS, device=role_N.device))
    return torch.where(answers, response, prompt)


@rule("focal", needs=("logprob",))
def focal(stats: TokenStats, *, gamma: float = 2.0) -> Tensor:
    """w = (1 - q(y))^gamma, in [0, 1]: focal loss (arXiv 1708.02002), its weight held constant."""
    _check("gamma", gamma, 0, math.inf, "a finite power of 0 or more")
    return (-torch.expm1(stats.logprob)).pow(gamma)


@rule("rank", needs=("rank",), cuts={"most": (1, 2, 3, 5, 10, 20, 50, 100)})
def rank(stats: TokenStats, *, most: int = 10) -> Tensor:
    """w = 1 where the rank of y is at most `most`, else 0; rank 1 is the most likely token."""
    _check("most", most, 1, math.inf, "a rank, 1 or more")
    return (stats.rank <= most).float()


@rule("entropy", needs=("entropy",), cuts={"low": NATS, "high": NATS})
def entropy(stats: TokenStats, *, low: float = 0.0, high: float = math.inf) -> Tensor:
    """w = 1 where low <= H <= high, else 0; H is the entropy of the distribution in nats."""
    _check("low", low, 0, math.inf, "an entropy in nats, 0 or more")
    if not low <= high:
        raise OptionError(f"--rule-arg high={high} is below low={low}.")
    return ((stats.entropy >= low) & (stats.entropy <= high)).float()


@rule("eaft", needs=("entropy_top20",))
def eaft(stats: TokenStats, *, alpha: float = 1.0, divisor: float = 3.0) -> Tensor:
    """w = (H20 / divisor)^alpha, in [0, 1) with a divisor of 3: EAFT (arXiv 2601.02151).

    H20 is the entropy in nats of the 20 most likely tokens, renormalised; 3 is about log 20.
    """
    _check("alpha", alpha, 0, math.inf, "a finite power of 0 or more")
    _check("divisor", divisor, math.ulp(0.0), math.inf, "a finite number of nats above 0")
    return (stats.entropy_top20 / divisor).pow(alpha)


@rule("eaft-full", needs=("entropy",))
def eaft_full(stats: TokenStats, *, alpha: float = 1.0) -> Tensor:
    """w = (min(H, 3) / 3)^alpha, in [0, 1]: EAFT (arXiv 2601.02151) from the entropy of the whole
    distribution in place of its 20 most likely tokens. An approximation, not the paper's rule."""
    _check("alpha", alpha, 0, math.inf, "a finite power of 0 or more")
    return (stats.entropy.clamp_max(3) / 3).pow(alpha)


@rule("idft", needs=("logprob", "entropy"))
def idft(stats: TokenStats, *, beta: float = 1.0, low: float = 0.1, high: float = 2.0) -> Tensor:
    """w = q(y)^g, g = exp(-(log q(y) + H) / beta) held within [low, high]: IDFT
    (arXiv 2602.12222), without its ramp over training.

    w is a constant, as every weight. The authors' code holds g constant and not q(y)^g: its
    gradient is that of the weight q(y)^g (1 + g log q(y)), negative where q(y) < exp(-1 / g).
    """
    _check("beta", beta, math.ulp(0.0), math.inf, "a finite temperature above 0")
    _check("high", high, 0, math.inf, "a finite power of 0 or more")
    _check("low", low, 0, high, "a power of 0 or more, not above high")
    power_N = torch.exp(-(stats.logprob + stats.entropy) / beta).clamp(low, high)
    return _power(stats.logprob, power_N)


@rule("deft", needs=("logprob", "collision"))
def deft(stats: TokenStats) -> Tensor:
    """w = q(y)^a, a = sum over tokens v of q(v)^2: DEFT (arXiv 2602.11424). The gradient of its
    loss (1 - p^a) / a, a being constant."""
    return _power(stats.logprob, stats.collision)


@rule("deft-cayley", needs=("logprob",), scope="batch")
def deft_cayley(stats: TokenStats) -> Tensor:
    """w = q(y)^a, a = f + (1 - f) q(y) / (2 - q(y)) held within [0.001, 1], f half the mean of
    q(y): the Cayley transform in the code of DEFT (arXiv 2602.11424)."""
    q_N = stats.logprob.exp()
    share = q_N.double().mean().float() / 2 if len(q_N) else 0.0
    return _power(stats.logprob, (share + (1 - share) * q_N / (2 - q_N)).clamp(0.001, 1))


@rule("talr", needs=("logprob",), scope="batch")
def talr(stats: TokenStats, sequence_N: Tensor, *, floor: float = 0.01) -> Tensor:
    """w = max(q(y)^(1 / t), floor), t the median over sequences of their mean -log q(y), at least
    1e-6: TALR (arXiv 2509.20758).

    As in a re-implementation (shankarp8/distillation-retains-capabilities), which takes the lower
    of two middle values for their median: the authors' code is not public, and whether they
    renormalise the weights could not be confirmed.
    """
    _check("floor", floor, 0, 1, "a weight, in [0, 1]")
    if not len(stats.logprob):
        return torch.zeros_like(stats.logprob)
    _, own = sequence_N.unique(return_inverse=True)
    counts = own.bincount().double()
    means = torch.zeros_like(counts).index_add_(0, own, -stats.logprob.double()) / counts
    ordered = means.sort().values
    median = (ordered[(len(means) - 1) // 2] + ordered[len(means) // 2]) / 2
    logs_N = stats.logprob.double() / median.clamp_min(1e-6)
    return torch.where(stats.logprob.isneginf(), 0.0, logs_N.exp()).clamp_min(floor).float()


@rule("ranktuner", needs=("logprob", "rank", "entropy"))
def ranktuner(stats: TokenStats, *, factor: Literal["prob", "one"] = "prob") -> Tensor:
    """w = f * (q(y) s)^-K, K = log2(x + 1)^-2, x = max(R, s), s = 2^(H / log 2) / 4 + 1: RankTuner
    (arXiv 2602.01745) in its practical form; f is q(y), as for mathematics, or 1.

    R is the rank of y and H the entropy in nats. Read from summaries of the paper, which say that s
    is its lower bound of the expected rank for an entropy of 2 bits or more; not confirmed from
    the paper or its code.
    """
    bound_N = torch.exp2(stats.entropy.double() / math.log(2)) / 4 + 1
    power_N = torch.log2(torch.maximum(stats.rank.double(), bound_N) + 1) ** -2
    own = 1.0 if factor == "prob" else 0.0  # joined to the other power: q(y) = 0 is no 0 * inf
    logs_N = (own - power_N) * stats.logprob.double() - power_N * bound_N.log()
    return logs_N.exp().float()


@rule("ranktuner-exact", needs=("logprob", "rank", "expected_rank"))
def ranktuner_exact(stats: TokenStats, *, factor: Literal["prob", "one"] = "prob") -> Tensor:
    """w = f * 2^(g(E) - g(R)), g(x) = 1 / log2(x + 1), R the rank of y and E the expected rank:
    RankTuner (arXiv 2602.01745) in its exact form; f is q(y), as for mathematics, or 1."""
    expected_N, own_N = stats.expected_rank.double(), stats.rank.double()
    tuned_N = torch.exp2(1 / torch.log2(expected_N + 1) - 1 / torch.log2(own_N + 1))
    return (tuned_N * (stats.logprob.double().exp() if factor == "prob" else 1.0)).float()


@rule("self-reference", needs=("logprob", "entropy"), scope="batch")
def self_reference(
    stats: TokenStats, *, by: Literal["loss", "entropy", "both"] = "both", keep: float = 0.7
) -> Tensor:
    """w = 1 for the share `keep` of tokens with the least loss -log q(y), the least entropy, or
    both (the intersection), else 0: the self-reference of Rho-1 (arXiv 2404.07965, section 3.4 and
    appendix H)."""
    _check("keep", keep, 0, 1, "a share, in [0, 1]")
    kept = torch.ones_like(stats.logprob)
    if by in ("loss", "both"):
        kept = kept * largest(stats.logprob, keep)
    return kept * largest(-stats.entropy, keep) if by in ("entropy", "both") else kept


def largest(scores_N: Tensor, share: float) -> Tensor:
    """float32 [N]: 1 for this share of the tokens with the largest scores, rounded, and for all
    that equal the least of them; else 0."""
    count = round(share * len(scores_N))
    if not count:
        return torch.zeros_like(scores_N, dtype=torch.float32)
    least = scores_N.kthvalue(len(scores_N) - count + 1).values
    return (scores_N >= least).float()


def _between(logprob_N: Tensor, low: float, high: float) -> Tensor:
    _check("low", low, 0, 1, "a probability, in [0, 1]")
    _check("high", high, low, 1, "a probability, in [0, 1] and not below low")
    low, high = (torch.tensor(b, dtype=torch.float64).log().float() for b in (low, high))
    return ((logprob_N >= low) & (logprob_N <= high)).float()


def _power(logprob_N: Tensor, power_N: Tensor) -> Tensor:
    """q(y)^power, 0^0 being 1."""
    return torch.where(power_N == 0, 1.0, torch.exp(power_N * logprob_N))


def _check(name: str, value: float, least: float, most: float, wanted: str) -> None:
    if not (least <= value <= most and value < math.inf):
        raise OptionError(f"--rule-arg {name}={value}: wanted {wanted}.")
