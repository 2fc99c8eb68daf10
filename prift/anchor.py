"""The anchor: a term of the loss that holds the model in training to the prior on label tokens.

k3 = exp(d) - d - 1 with d = log q(y) - log p(y), where q is the prior and p the model in training:
0 where the two agree about the label token y, and larger the further they part. It is the third
estimator of KL(p || q) of J. Schulman (joschu.net/blog/kl-approx.html, 2020), which is unbiased
where y is drawn from p; here y is the data's, so it estimates no KL of the two models.
"""

import torch
from torch import Tensor

ANCHORS = ("k3",)
"""--anchor."""

_FAR = 20.0  # nats of d up to which exp(d), 5e8 there, is worth a gradient that float32 can square


def k3(logprob_N: Tensor, nll_N: Tensor) -> tuple[Tensor, Tensor]:
    """(values, their derivative by nll, which is q / p - 1), float32 [N].

    logprob_N  log q(y)
    nll_N      -log p(y)

    Beyond d = 20 the value goes on as its tangent. Tokens to which the prior gave no chance at all
    (-inf) have none and pull nowhere: both are 0.
    """
    d_N = logprob_N.double() + nll_N.double()
    near_N = d_N.clamp_max(_FAR)
    slope_N = near_N.expm1()
    value_N = slope_N - near_N + slope_N * (d_N - near_N)
    none_N = logprob_N.isneginf()
    return torch.where(none_N, 0.0, value_N).float(), torch.where(none_N, 0.0, slope_N).float()
