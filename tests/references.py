"""Each definition once, naively: plain loops over a full softmax in float64.

Written from the formulas in docs/statistics.md, not from the code under test. Benchmarks import
these too. Weights of rules are in rule_references.py.
"""

import math

import numpy as np


def token_stats(logits: np.ndarray, target: int) -> dict[str, float]:
    """All statistics of one position from its logits [V], in float64."""
    z = np.asarray(logits, np.float64)
    shifted = np.exp(z - z.max())
    q = shifted / shifted.sum()
    logprob = z[target] - z.max() - math.log(shifted.sum())
    above = z > z[target]
    entropy = -sum(p * math.log(p) for p in q if p > 0)
    # log of the mass at or below the target, scaled by the target so that it cannot underflow
    ratios = [math.exp(v - z[target]) for v in z[~above]] if z[target] > -math.inf else [0.0]
    total = sum(ratios)
    log_mass = logprob + math.log(total) if total > 0 else -math.inf
    if log_mass > -0.7:  # more than half: only the mass above keeps the digits
        log_mass = math.log1p(-q[above].sum()) if above.any() else 0.0
    top = np.sort(q)[::-1][:20] / np.sort(q)[::-1][:20].sum()
    return {
        "logprob": min(logprob, 0.0),
        "log_mass_rank": log_mass,
        "rank": 1 + int(above.sum()),
        "n_tie": int((z == z[target]).sum()),
        "entropy": entropy,
        "collision": float((q * q).sum()),
        "expected_rank": float(sum(p * r for p, r in zip(q, _strict_ranks(z), strict=True) if p)),
        "entropy_top20": -sum(p * math.log(p) for p in top if p > 0),
    }


def _strict_ranks(z: np.ndarray) -> np.ndarray:
    """1 + how many are greater, for each."""
    return 1 + len(z) - np.searchsorted(np.sort(z), z, "right")


def mass_rank(logits: np.ndarray, target: int) -> float:
    """u of the paper, as a probability: the sum of q(v) over z(v) <= z(y)."""
    z = np.asarray(logits, np.float64)
    q = np.exp(z - z.max())
    return float((q / q.sum())[z <= z[target]].sum())


def naive_float32(logits: np.ndarray, target: int) -> dict[str, float]:
    """The obvious float32 code: what a careful user would write with torch."""
    import torch

    z = torch.as_tensor(logits, dtype=torch.float32)
    logq = torch.log_softmax(z, 0)
    below = z <= z[target]
    return {
        "logprob": float(logq[target]),
        "log_mass_rank": float(logq[below].exp().sum().log()),
        "entropy": float(-(logq.exp() * logq).nan_to_num(0.0).sum()),
        "collision": float((logq.exp() ** 2).sum()),
        "expected_rank": float((logq.exp() * torch.as_tensor(_strict_ranks(z.numpy()))).sum()),
        "entropy_top20": float(
            torch.distributions.Categorical(logits=z.topk(min(20, len(z)))[0]).entropy()
        ),
    }


def official_code_score(logits: np.ndarray, target: int) -> float:
    """PriFT's score in the authors' code: strictly less likely mass plus the target's own."""
    z = np.asarray(logits, np.float64)
    q = np.exp(z - z.max())
    q = q / q.sum()
    return float(q[z < z[target]].sum() + q[target])


def sorted_stats(logits, targets):
    """What sorting gives, for whole rows in torch: (logprob, mass rank u, entropy), each [N].

    log_softmax, sort, cumulative sum: the obvious way to a mass rank, ties counted like the paper.
    """
    logq = logits.float().log_softmax(1)
    own = logq.gather(1, targets[:, None])
    ordered = logq.sort(1).values
    mass = ordered.exp().cumsum(1)
    last = (ordered <= own).sum(1, keepdim=True) - 1  # the last of those at most as likely
    entropy = -(logq.exp() * logq).nan_to_num(0.0).sum(1)
    return own[:, 0], mass.gather(1, last)[:, 0], entropy


def online_score(logits, targets):
    """What PriFT's training loop takes from a reference model's logits, per batch: (q(y), score).

    arXiv 2606.09396: softmax in float32, the mass strictly below the target, the target's own.
    """
    q = logits.float().softmax(1)
    own = q.gather(1, targets[:, None])
    below = (q * (q < own)).sum(1)
    return own[:, 0], below + own[:, 0]


def weighted_loss(logits, labels, weights, denominator: float):
    """sum of w(t) * -log p(t) over label tokens / denominator, in the logits' dtype, with autograd.

    logits [B, T, V], labels [B, T] (-100 = none), weights [B, T] at the token's own place
    """
    import torch

    total = torch.zeros((), dtype=logits.dtype)
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                nll = -torch.log_softmax(logits[b, t - 1], 0)[labels[b, t]]
                total = total + weights[b, t] * nll
    return total / denominator


def k3(log_q: float, log_p):
    """exp(d) - d - 1, d = log q - log p: the anchor of one token, with autograd where log_p has it
    (a float, or a scalar tensor). 0 where q is 0."""
    if log_q == -math.inf:
        return 0 * log_p
    d = log_q - log_p
    return (math.exp(d) if isinstance(d, float) else d.exp()) - d - 1


def anchor(logits, labels, logprob):
    """The sum of k3 over label tokens, in the logits' dtype, with autograd. See weighted_loss.

    logprob  [B, T], log q of each label token at its own place
    """
    import torch

    total = torch.zeros((), dtype=logits.dtype)
    for b, t in (labels != -100).nonzero().tolist():
        log_p = torch.log_softmax(logits[b, t - 1], 0)[labels[b, t]]
        total = total + k3(float(logprob[b, t]), log_p)
    return total
