"""Whether two scorings of the same tokens agree: how far apart rounding may put them.

Largest mean |difference| of logprob, in nats, that rounding explains. Measured with the embedded
model over its demonstrations, and in brackets with 36 tiny architectures of random weights
(tests/families.py; faults with 15 of them), which give nearly all tokens the same logprob:

  float32 against float32 in other batches             0.00000002  [up to 0.0000005]
  float32 against float16                              0.0011      [0.00003 to 0.0044]
  float32 against bfloat16, either way                 0.0091      [0.0002 to 0.039]
  float32 against bfloat16 with bfloat16 logits        0.010-0.022 [0.0003 to 0.037]
  bfloat16 against bfloat16 in other batches           0.000002    [up to 0.0052]

  shifted by one token                                 1.97        [0.085 to 3.2; Llama 0.36]
  values of other tokens                               3.27        [0.086 to 2.9; Llama 0.45]
  scored behind a prompt with "User: " in front        0.34
  noise of 2 % of its deviation on every weight        0.039       [0.0023 to 0.34]
  1, 10, 40 steps of AdamW at 1e-5 further             0.0055, 0.040, 0.106
  30 steps of prift train at 3e-4 further              2.6

stories260k in bfloat16 is 0.021 off, with bfloat16 logits 0.023 (docs/precision.md). So a
neighbour that has hardly moved is told from the prior where both are float32, and only there.
"""

from collections.abc import Iterable, Iterator

import numpy as np

EXACT = 1e-3
ROUNDED = 0.1
_TOKEN = 20  # one token's difference may be so many times the bound of the mean
_ABSOLUTE = ("logprob", "entropy", "collision", "entropy_top20")
_NEAR_TIES = {EXACT: 0.01, ROUNDED: 1.0}  # share of its rank that a token may move
_SHARE = {EXACT: 0.02, ROUNDED: 0.5}  # of u beyond what moved ranks explain


def bound(dtypes: Iterable[str]) -> float:
    """Of the mean |difference| of logprob over many tokens, in nats.

    dtypes  all that took part: of the weights, of the logits, of what is stored
    """
    return EXACT if set(dtypes) == {"float32"} else ROUNDED


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 |a - b|; 0 where both are the same infinity, inf where only one is a number."""
    with np.errstate(invalid="ignore"):
        off = np.abs(a.astype(np.float64) - b)
    return np.where(a == b, 0.0, np.nan_to_num(off, nan=np.inf))


def over_budget(off: np.ndarray, dtypes: Iterable[str]) -> bool:
    """Whether these differences of one sequence, in nats, are more than rounding explains."""
    limit = bound(dtypes)
    mean = limit * (1 + 4 / max(len(off), 1) ** 0.5)  # that over few tokens is less certain
    return bool(off.mean() > mean or off.max() > limit * _TOKEN)


def disagreements(
    old: dict[str, np.ndarray], new: dict[str, np.ndarray], dtypes: Iterable[str]
) -> Iterator[tuple[str, int]]:
    """(statistic, worst token) of two scorings of one sequence that rounding does not explain.

    A rank moves where logits lie close together, and u with it by the probabilities of the tokens
    that were passed: each is close to the token's own.
    """
    limit = bound(dtypes)
    with np.errstate(all="ignore"):
        for name in _ABSOLUTE:
            if name in old and over_budget(off := difference(old[name], new[name]), dtypes):
                yield name, int(off.argmax())
        if "expected_rank" in old:
            off = difference(np.log(old["expected_rank"]), np.log(new["expected_rank"]))
            if over_budget(off, dtypes):
                yield "expected_rank", int(off.argmax())
        room = 3 + _NEAR_TIES[limit] * new["rank"].astype(np.float64)
        for name in ("rank", "n_tie"):
            off = difference(old[name], new[name]) - room
            if (off > 0).any():
                yield name, int(off.argmax())
        moved = old["rank"].astype(np.float64) - new["rank"]
        passed = moved * np.exp(new["logprob"].astype(np.float64))
        share = np.exp(old["log_mass_rank"].astype(np.float64)) - np.exp(new["log_mass_rank"])
        off = np.abs(share + passed) - 0.05 * np.abs(passed) - _SHARE[limit]
        log_off = difference(old["log_mass_rank"], new["log_mass_rank"])
        off = np.maximum(off, np.where(moved == 0, log_off - limit * _TOKEN, -np.inf))
        if not (off <= 0).all():
            yield "log_mass_rank", int(np.nan_to_num(off, nan=np.inf).argmax())
