"""What the loss of a step is divided by: --normalize. See docs/methods.md.

Where weights are known before training, so is the denominator of every step. Where they are those
of the model in training, it is known once the last micro-batch has run: the step is divided by its
label tokens as ever, and its gradient corrected once (LateDivision).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prift.arguments import is_set
from prift.errors import OptionError

DENOMINATORS: dict[str, Callable[[np.ndarray], float]] = {
    "tokens": len,
    "kept": np.count_nonzero,
    "weights": lambda weights: float(np.abs(weights).sum(dtype=np.float64)),
    "sequence": lambda weights: 1,
    "micro-batch": len,
    "micro-batch-sum": len,
}
"""What an example's label tokens of these weights add to the denominator, by normaliser: of the
step, or of its own micro-batch."""

_LATE: dict[str, Callable[[Tensor], Tensor]] = {
    "kept": torch.count_nonzero,
    "weights": lambda weights_N: weights_N.double().abs().sum(),
}
"""The same of a micro-batch's weights, for the normalisers that look at them."""


def means_averaged(normalize: str, accumulation: int, processes: int) -> int | None:
    """By how many the sum of the micro-batches' own means is divided; None: the step has one
    denominator. accumulation: micro-batches of a step in one process."""
    every = {"micro-batch": accumulation * processes, "micro-batch-sum": processes}
    return every.get(normalize)


def is_late(normalize: str, known: bool) -> bool:
    """Whether a step's denominator is known only after it. known: whether its weights are."""
    return normalize in _LATE and not known


class LateDivision:
    """Divides one step after another by what its own weights decide.

    Each micro-batch is seen by `see` and `see_loss`, its loss divided by the label tokens of the
    whole step; `finish` then multiplies the gradient by label tokens / denominator, both over all
    processes. Gradients stay in the range they have without; a step without weight gets none.
    """

    def __init__(self, normalize: str):
        self._count = _LATE[normalize]
        self._denominator: Tensor | float = 0.0
        self._loss: Tensor | float = 0.0

    def see(self, weights_N: Tensor) -> None:
        """The weights of a micro-batch's label tokens."""
        self._denominator = self._denominator + self._count(weights_N)

    def see_loss(self, loss: Tensor) -> None:
        """The loss of a micro-batch, detached."""
        self._loss = self._loss + loss

    def finish(
        self, model: torch.nn.Module, labels: Tensor, total: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Corrects the gradients, which are summed over all processes, unclipped, and may be scaled
        for float16. Returns what the losses seen lack of the step's.

        labels  label tokens of the step in all processes
        total   the sum of a tensor over all processes
        """
        denominator = float(total(torch.as_tensor(self._denominator, device=labels.device)))
        factor = float(labels) / denominator if denominator else 0.0
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        lacking = (factor - 1) * self._loss
        self._denominator = self._loss = 0.0
        return lacking


def check_late(normalize: str, training: Any, balanced: bool, anchored: bool) -> None:
    """Raises OptionError where LateDivision could not be exact.

    training  transformers.TrainingArguments
    balanced  whether the model adds a loss that balances experts
    """
    optimiser, reason = str(getattr(training.optim, "value", training.optim)), None
    if training.deepspeed or is_set("ACCELERATE_USE_DEEPSPEED"):
        reason = "DeepSpeed clips and takes the gradient before it could be divided"
    elif "lomo" in optimiser or "layerwise" in optimiser:
        reason = f"--optim {optimiser} steps inside the backward pass"
    elif balanced:
        reason = "the balance loss of experts (output_router_logits) would be divided with it"
    elif anchored:
        reason = "the anchor, a mean over label tokens, would be divided with it"
    if reason is not None:
        raise OptionError(
            f"--normalize {normalize} is refused here: with --source online the weights of a step "
            f"are known only after it, and {reason}. Take --normalize tokens, or --source prior."
        )
