"""What label tokens add to the loss: weight * scale * nll, and with an anchor its pull.

Weights are known beforehand, or are those of a rule that asks the model in training, whose
statistics exist only while its logits do. Either way a chunk of rows is asked once, with its nll.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prift.anchor import k3
from prift.stats import TokenStats
from prift.weigher import Weigher

Asked = Callable[[Sequence[str]], TokenStats]
"""Statistics by name: of a chunk's rows, or of all."""


@dataclass(frozen=True, slots=True)
class Online:
    """What weighs tokens by what the model in training thinks of them. For the arguments see
    loss.weighted_loss."""

    weigher: Weigher
    prior: TokenStats
    sequence_N: Tensor | None
    role_N: Tensor | None

    def rows(self, rows: slice, nll_C: Tensor, asked: Asked) -> Tensor:
        """Weights [C] of these rows. Of the statistics the logprob alone is known already."""
        if set(self.weigher.needs) <= {"logprob"}:
            stats = TokenStats(logprob=(-nll_C).clamp_max(0))
        else:
            stats = asked(self.weigher.needs)
        sequence_C, role_C = (
            None if values is None else values[rows] for values in (self.sequence_N, self.role_N)
        )
        base = self.prior.map(lambda values: values[rows].to(nll_C.device))
        return self.weigher(stats, sequence_C, base, role_C).expand(len(nll_C))

    @torch.no_grad()
    def all(self, asked: Asked) -> Tensor:
        """Weights [N] of rules that look at many tokens, whose statistics are made beforehand."""
        stats = asked(self.weigher.needs)
        like = getattr(stats, stats.names()[0])
        base = self.prior.map(lambda values: values.to(like.device))
        return self.weigher(stats, self.sequence_N, base, self.role_N).expand(len(like))


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

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that `rows` may ask for."""
        return self.weights.weigher.needs if isinstance(self.weights, Online) else ()

    def rows(self, rows: slice, nll_C: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
        """(weights, what each token adds, its derivative by nll), float32 [C].

        asked  gives these rows' statistics
        """
        if isinstance(self.weights, Tensor):
            weights_C = self.weights[rows]
        else:
            weights_C = self.weights.rows(rows, nll_C, asked)
        slope_C = weights_C if self.scale_N is None else weights_C * self.scale_N[rows]
        value_C = slope_C * nll_C
        if self.anchor is not None:
            apart_C, pull_C = k3(self.anchor.logprob_N[rows], nll_C)
            value_C = value_C + self.anchor.factor * apart_C
            slope_C = slope_C + self.anchor.factor * pull_C
        return weights_C, value_C, slope_C
