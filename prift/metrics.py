"""Metrics of a training run: what each label token adds to sums, and ratios of sums.

Sums are exact however tokens are cut into batches, and over any number of processes.
"""

import torch
from torch import Tensor

from prift.anchor import k3
from prift.forward import Weighted

# What is summed over label tokens; a drift, and the anchor, where the prior gave the token any
# chance.
SUMS = (
    "tokens", "weight", "zero", "run", "nll_run", "drifts_run", "drift_run",
    "full", "nll", "drifts", "drift", "anchored", "anchor", "weighted",
)  # fmt: skip

OF_A_CUT_TOKEN = [float(name in ("tokens", "zero")) for name in SUMS]
"""What a token adds that was cut off, whose weight is 0."""


def per_token(out: dict[str, Tensor], weighted: Weighted) -> Tensor:
    """[N, len(SUMS)] float64: what each token adds to the sums."""
    nll_N, weights_N = out["nll"].double(), out["weights"].double()
    one, zero = torch.ones_like(nll_N), torch.zeros_like(nll_N)
    ran = (weights_N != 0).double()
    prior_N = (
        weighted.prior["logprob"].double() if "logprob" in weighted.prior else zero - torch.inf
    )
    finite = (prior_N > -torch.inf).double()
    drift_N = -nll_N - prior_N
    every = one if weighted.every_nll else zero
    anchored, apart_N = zero, zero
    if weighted.anchor is not None:
        anchored, apart_N = finite, k3(prior_N, nll_N)[0].double()
    columns = [
        *(one, weights_N, 1 - ran),
        *(ran, _where(ran, nll_N), ran * finite, _where(ran * finite, drift_N)),
        *(every, _where(every, nll_N), every * finite, _where(every * finite, drift_N)),
        *(anchored, apart_N, _where(ran, weights_N * nll_N)),
    ]
    return torch.stack(columns, 1)


def _where(chosen_N: Tensor, values_N: Tensor) -> Tensor:
    """The values where chosen, else 0: what was not run is NaN, which a product would keep."""
    return torch.where(chosen_N > 0, values_N, 0.0)


def ratios(sums: dict[str, float]) -> dict[str, float]:
    """Metrics from sums; those that were not measured are left out."""
    parts = {
        "mean_weight": ("weight", "tokens"),
        "zero_share": ("zero", "tokens"),
        "nll_kept": ("nll_run", "run"),
        "drift_kept": ("drift_run", "drifts_run"),
        "nll": ("nll", "full"),
        "drift": ("drift", "drifts"),
        "anchor": ("anchor", "anchored"),
    }
    return {name: sums[a] / sums[b] for name, (a, b) in parts.items() if sums[b]}
