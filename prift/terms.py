"""What label tokens add to the loss: weight * scale * nll, and with an anchor its pull.

Weights are known beforehand, or are those of a rule that asks the model in training, whose
statistics exist only while its logits do. Either way a chunk of rows is asked once, with its nll.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prift.anchor import k3
from prift.fold import Fold
from prift.heads import Head
from prift.stats import TokenStats
from prift.weigher import Weigher


@dataclass(frozen=True, slots=True)
class Online:
    """What weighs tokens by what the model in training thinks of them. For the arguments see
    loss.weighted_loss."""

    weigher: Weigher
    prior: TokenStats
    sequence_N: Tensor | None
    role_N: Tensor | None

    def rows(self, rows: slice, head: Head, h_CH: Tensor, y_C: Tensor, nll_C: Tensor) -> Tensor:
        """Weights [C] of these rows. Of the statistics the logprob alone is known already; for
        more the logits are made once more, since ties and ranks need them unrounded."""
        if set(self.weigher.needs) <= {"logprob"}:
            stats = TokenStats(logprob=(-nll_C).clamp_max(0))
        else:
            stats = Fold(head, names=self.weigher.needs)(h_CH, y_C)
        sequence_C, role_C = (
            None if values is None else values[rows] for values in (self.sequence_N, self.role_N)
        )
        base = self.prior.map(lambda values: values[rows].to(h_CH.device))
        return self.weigher(stats, sequence_C, base, role_C).expand(len(y_C))

    @torch.no_grad()
    def all(self, hidden_NH: Tensor, head: Head, targets_N: Tensor) -> Tensor:
        """Weights [N] of rules that look at many tokens: a pass over the chunks of its own."""
        stats = Fold(head, names=self.weigher.needs)(hidden_NH, targets_N)
        base = self.prior.map(lambda values: values.to(hidden_NH.device))
        found = self.weigher(stats, self.sequence_N, base, self.role_N)
        return found.expand(len(targets_N))


@dataclass(frozen=True, slots=True)
class Anchor:
    """A factor of each token's k3, and log q(y) of the prior [N]."""

    factor: float | Tensor
    logprob_N: Tensor


@dataclass(frozen=True, slots=True)
class Terms:
    """What N label tokens add to the loss.

    weights  float32 [N], or what makes them
    scale_N  float32 [N], a factor of weight * nll; None: 1
    """

    weights: Tensor | Online
    scale_N: Tensor | None = None
    anchor: Anchor | None = None

    def rows(
        self, rows: slice, head: Head, h_CH: Tensor, y_C: Tensor, nll_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weights, what each token adds, its derivative by nll), float32 [C]."""
        if isinstance(self.weights, Tensor):
            weights_C = self.weights[rows]
        else:
            weights_C = self.weights.rows(rows, head, h_CH, y_C, nll_C)
        slope_C = weights_C if self.scale_N is None else weights_C * self.scale_N[rows]
        value_C = slope_C * nll_C
        if self.anchor is not None:
            apart_C, pull_C = k3(self.anchor.logprob_N[rows], nll_C)
            value_C = value_C + self.anchor.factor * apart_C
            slope_C = slope_C + self.anchor.factor * pull_C
        return weights_C, value_C, slope_C
