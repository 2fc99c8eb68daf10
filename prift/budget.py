"""How far two scorings of the same tokens by the same model may lie apart: the error budget.

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

from collections.abc import Iterable

EXACT = 1e-3
ROUNDED = 0.1
TOKEN = 20
"""One token's difference may be so many times the bound of the mean."""


def bound(dtypes: Iterable[str]) -> float:
    """Of the mean |difference| of logprob over many tokens, in nats.

    dtypes  all that took part: of the weights, of the logits, of what is stored
    """
    return EXACT if set(dtypes) == {"float32"} else ROUNDED


def bound_of(dtypes: Iterable[str], tokens: int) -> float:
    """The same over this many tokens: the mean over few is less certain."""
    return bound(dtypes) * (1 + 4 / max(tokens, 1) ** 0.5)
