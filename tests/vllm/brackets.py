"""Between what a rank and a mass rank must lie where two engines' logits differ a little.

Two engines that run the same float32 model agree in each logit to some 1e-5. That moves
log-probability and entropy as little, but where another token's logit lies as near to the
target's, it may stand on either side of it, and its whole probability goes with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import transformers as tf

NEAR = 1e-3  # logits so close to the target's may stand on either side of it
CLOSE = 1e-4  # nats: what engines may differ by in a log-probability, an entropy, log u


@dataclass(frozen=True)
class Brackets:
    """Of N positions, float64 [N]: least and most that rank and log u can be; log q(y), entropy.

    near  how many other logits lie within NEAR of the target's
    """

    rank_least: np.ndarray
    rank_most: np.ndarray
    mass_least: np.ndarray
    mass_most: np.ndarray
    near: np.ndarray
    logprob: np.ndarray
    entropy: np.ndarray

    def rows(self, chosen: np.ndarray) -> "Brackets":
        """Those of these positions (int [M])."""
        return Brackets(*(getattr(self, field.name)[chosen] for field in fields(self)))


def brackets(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> Brackets:
    """From whole rows of logits, float64."""
    z = logits_NV.double()
    logq = z.log_softmax(1)
    q = logq.exp()
    gap = z - z.gather(1, targets_N[:, None])
    above, below = gap >= NEAR, gap <= -NEAR
    near = ~(above | below)
    near[torch.arange(len(z)), targets_N] = False
    own = q.gather(1, targets_N[:, None])[:, 0]
    sure, beside, more = ((q * mask).sum(1) for mask in (below, near, above))
    nothing_above = ~above.any(1)
    columns = {
        "rank_least": 1 + above.sum(1),
        "rank_most": 1 + above.sum(1) + near.sum(1),
        "mass_least": _log(sure + own, beside + more, nothing_above & ~near.any(1)),
        "mass_most": _log(sure + own + beside, more, nothing_above),
        "near": near.sum(1),
        "logprob": logq.gather(1, targets_N[:, None])[:, 0],
        "entropy": -(q * logq).sum(1),
    }
    return Brackets(**{name: column.double().numpy() for name, column in columns.items()})


def _log(mass: torch.Tensor, rest: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """log of the mass; from the rest, where that is the smaller; 0 where nothing else is left."""
    log = torch.where(mass > 0.5, torch.log1p(-rest), mass.log())
    return torch.where(whole, 0.0, log)


@torch.no_grad()
def of_model(
    folder: str, sequences: list[np.ndarray], dtype: str = "float32"
) -> Iterator[Brackets]:
    """The brackets at every position but the first, from the full logits that transformers'
    model of this folder answers with, each sequence run alone."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    for ids in sequences:
        tokens = torch.tensor(ids.astype(np.int64))
        logits = model(tokens[None]).logits[0, :-1]
        yield brackets(logits, tokens[1:])


def check(found: dict[str, np.ndarray], allowed: Brackets, where: str = "") -> None:
    """Statistics [N] of an engine. Raises AssertionError for the first that is outside."""
    assert all(len(column) == len(allowed.near) for column in found.values()), where
    for name in ("logprob", "entropy"):
        off = np.abs(found[name] - getattr(allowed, name))
        assert off.max(initial=0) <= CLOSE, f"{where}: {name} is off by {off.max()}"
    rank, log_mass = found["rank"], found["log_mass_rank"]
    inside = (allowed.rank_least <= rank) & (rank <= allowed.rank_most)
    assert inside.all(), f"{where}: rank at {np.flatnonzero(~inside)}"
    # log u is an average of the members' log q, weighted by q: no further off than the furthest.
    inside = (allowed.mass_least - CLOSE <= log_mass) & (log_mass <= allowed.mass_most + CLOSE)
    assert inside.all(), f"{where}: log u at {np.flatnonzero(~inside)}"
    assert ((rank == 1) == (log_mass == 0)).all(), where
    ties = found["n_tie"]
    assert ((1 <= ties) & (ties <= 1 + allowed.near)).all(), where


def check_decisions(
    one: np.ndarray, other: np.ndarray, allowed: Brackets, thresholds: tuple[float, ...]
) -> int:
    """PriFT-mass keeps a token where u >= threshold: the same tokens for both log u [N], save where
    the threshold lies inside the bracket. Returns how many decisions were compared."""
    compared = 0
    for threshold in thresholds:
        bound = np.log(threshold)
        low, high = allowed.mass_least - CLOSE, allowed.mass_most + CLOSE
        decided = (bound < low) | (bound > high)
        assert ((one >= bound) == (other >= bound))[decided].all(), threshold
        compared += int(decided.sum())
    return compared
