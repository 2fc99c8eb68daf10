"""Each weighting rule once, naively: from the papers' formulas, in float64, with loops.

    weight_<rule>(q, y, **options) -> float                 rules of token scope
    weight_<rule>(role, **options) -> float                 those that look at its role alone
    weight_<rule>(p, y, q, **options) -> float              those that compare with a base q
    weights_<rule>(p_NV, y_N, sequence_N, [q_NV], **options) -> N floats      all others

Distributions are probabilities, made of logits by `softmax`; y is the token that follows. `weights`
calls whichever there is. Written from the formulas, not from the code under test.
"""

import inspect
import math
import sys

import numpy as np


def weights(
    name, logits_NV, targets_N, sequence_N, base_NV=None, role_N=None, **options
) -> np.ndarray:
    """float64 [N]: the rule's weights of N tokens, from logits [N, V] or names of roles."""
    own = sys.modules[__name__]
    name = name.replace("-", "_")
    pairs = [softmax(logits_NV)] if base_NV is None else [softmax(logits_NV), softmax(base_NV)]
    wide = getattr(own, f"weights_{name}", None)
    if wide is not None:
        takes = len(inspect.signature(wide).parameters) - len(_options(wide))
        arguments = [pairs[0], targets_N, sequence_N, *pairs[1:]][:takes]
        return np.array(wide(*arguments, **options), float)
    narrow = getattr(own, f"weight_{name}")
    if "role" in inspect.signature(narrow).parameters:
        return np.array([narrow(role, **options) for role in role_N], float)
    rows = zip(pairs[0], targets_N, *pairs[1:], strict=True)
    takes = len(inspect.signature(narrow).parameters) - len(_options(narrow))
    return np.array([narrow(*row[:takes], **options) for row in rows], float)


def _options(function) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is not p.empty]


def softmax(logits) -> np.ndarray:
    """float64, over the last axis."""
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _entropy(q) -> float:
    return -sum(p * math.log(p) for p in q if p > 0)


def _rank(q, y) -> int:
    return 1 + sum(v > q[y] for v in q)


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def _best(scores, share: float) -> list[float]:
    """1 where fewer than share * N others score higher, share * N being rounded."""
    count = round(share * len(scores))
    return [float(sum(other > own for other in scores) < count) for own in scores]


def weight_uniform(q, y):
    return 1.0


def weight_prob(q, y, power=1.0):
    return q[y] ** power


def weight_mass(q, y, threshold=0.5, ties="paper"):
    if ties == "paper":
        score = sum(v for v in q if v <= q[y])
    else:  # the authors' code: strictly less likely, and y once
        score = sum(v for v in q if v < q[y]) + q[y]
    return float(score >= threshold)


def weight_threshold(q, y, low=0.1, high=1.0):
    return float(low <= q[y] <= high)


def weight_prob_threshold(q, y, low=0.0, high=1.0):
    return q[y] if low <= q[y] <= high else 0.0


def weight_wit(role, prompt=0.0, response=1.0):
    return response if role in ("response", "assistant") else prompt


def weight_focal(q, y, gamma=2.0):
    return (1 - q[y]) ** gamma


def weight_rank(q, y, most=10):
    return float(_rank(q, y) <= most)


def weight_entropy(q, y, low=0.0, high=math.inf):
    return float(low <= _entropy(q) <= high)


def weight_eaft(q, y, alpha=1.0, divisor=3.0):
    top = sorted(q, reverse=True)[:20]
    return (_entropy([v / sum(top) for v in top]) / divisor) ** alpha


def weight_eaft_full(q, y, alpha=1.0):
    return min(_entropy(q) / 3.0, 1.0) ** alpha


def weight_idft(q, y, beta=1.0, low=0.1, high=2.0):
    centred = _log(q[y]) + _entropy(q)
    gamma = high if centred == -math.inf else _clip(math.exp(-centred / beta), low, high)
    return q[y] ** gamma


def weight_deft(q, y):
    return q[y] ** sum(v * v for v in q)


def weights_deft_cayley(q_NV, y_N, sequence_N):
    own = [q[y] for q, y in zip(q_NV, y_N, strict=True)]
    floor = 0.5 * sum(own) / len(own)
    local = [(1 - (1 - p)) / (1 + (1 - p)) for p in own]
    alphas = [_clip(floor + (1 - floor) * a, 0.001, 1.0) for a in local]
    return [p**a for p, a in zip(own, alphas, strict=True)]


def weights_talr(q_NV, y_N, sequence_N, floor=0.01):
    losses = {}
    for q, y, s in zip(q_NV, y_N, sequence_N, strict=True):
        losses.setdefault(int(s), []).append(-_log(q[y]))
    temperature = max(float(np.median([sum(x) / len(x) for x in losses.values()])), 1e-6)
    return [max(q[y] ** (1 / temperature), floor) for q, y in zip(q_NV, y_N, strict=True)]


def weight_ranktuner(q, y, factor="prob"):
    bits = _entropy(q) / math.log(2)
    bound = 0.25 * 2**bits + 1
    xi = max(_rank(q, y), bound)
    scale = (q[y] * bound) ** -(math.log2(xi + 1) ** -2)
    return (q[y] if factor == "prob" else 1.0) * scale


def weight_ranktuner_exact(q, y, factor="prob"):
    expected = sum(v * _rank(q, i) for i, v in enumerate(q))
    indicator = 2 ** (1 / math.log2(_rank(q, y) + 1) - 1 / math.log2(expected + 1))
    return (q[y] if factor == "prob" else 1.0) / indicator


def weights_self_reference(q_NV, y_N, sequence_N, by="both", keep=0.7):
    likely = _best([_log(q[y]) for q, y in zip(q_NV, y_N, strict=True)], keep)
    certain = _best([-_entropy(q) for q in q_NV], keep)
    both = [a * b for a, b in zip(likely, certain, strict=True)]
    return {"loss": likely, "entropy": certain, "both": both}[by]


def weight_iw_sft(p, y, q, low=0.2, high=1.8):
    return _clip(p[y] / q[y], low, high)


def weights_iw_sft_sequence(p_NV, y_N, sequence_N, q_NV, temperature=1.0, most=16.0):
    found = []
    for s in sequence_N:
        own = [i for i, other in enumerate(sequence_N) if other == s]
        mean = sum(_log(p_NV[i][y_N[i]]) - _log(q_NV[i][y_N[i]]) for i in own) / len(own)
        found.append(_clip(math.exp(temperature * mean), 0.0, most))
    return found


def weight_psft(p, y, q, high=0.28):
    ratio = p[y] / q[y]
    return ratio if ratio < 1 + high else 0.0


def weights_pear(
    p_NV, y_N, sequence_N, q_NV,
    discount=0.999, low=0.1, high=10.0, least_log=-0.08, most_log=0.3,
):  # fmt: skip
    logs = [_log(p[y]) - _log(q[y]) for p, y, q in zip(p_NV, y_N, q_NV, strict=True)]
    ratios = [math.exp(_clip(d, least_log, most_log)) for d in logs]
    found = []
    for t, s in enumerate(sequence_N):
        later = [j for j in range(t + 1, len(sequence_N)) if sequence_N[j] == s]
        product = math.prod(ratios[j] for j in later)
        found.append(_clip(discount ** len(later) * product, low, high))
    return found


def weights_rho_1(p_NV, y_N, sequence_N, q_NV, keep=0.6):
    triples = zip(p_NV, y_N, q_NV, strict=True)
    return _best([-_log(p[y]) + _log(q[y]) for p, y, q in triples], keep)


def weights_token_cleaning(p_NV, y_N, sequence_N, q_NV, keep=0.6):
    triples = zip(p_NV, y_N, q_NV, strict=True)
    return _best([-_log(q[y]) + _log(p[y]) for p, y, q in triples], keep)
