"""The gradients of the output projection, summed up over chunks of label tokens.

Their products have operands of the model's precision. The factor that keeps the gradients of a
float16 loss in range (--fp16) comes behind them, so here they are brought into range themselves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prift.chunk import Chunk
from prift.products import add_pull_back, add_turned
from prift.wholechunk import WholeChunk


@dataclass(slots=True)
class Gradients:
    """What is summed up over chunks; None where nobody needs it.

    hidden_RH of a dtype that a later factor of the loss cannot harm; weight_VH, bias_V float32
    times    by which weight_VH and bias_V are multiplied: a power of two
    """

    hidden_RH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None
    times: Tensor | float = 1.0

    def add(self, rows: slice, chunk: Chunk | WholeChunk, slopes_C: Tensor) -> None:
        """The gradients over one chunk's rows of what has this derivative by their nll."""
        h_CH = chunk.hidden_CH
        if h_CH.dtype == torch.float16:  # the factor that keeps a loss in its range comes later
            self.hold(_power(slopes_C))
            slopes_C = slopes_C * self.times
        grad_CH = torch.zeros_like(h_CH, dtype=torch.float32)
        for tile, g_CT in chunk.gradients(slopes_C):
            if self.bias_V is not None:
                self.bias_V[tile] += g_CT.sum(0)
            g_CT = g_CT.to(h_CH.dtype)
            if self.hidden_RH is not None:
                add_pull_back(grad_CH, g_CT, chunk.head.weight[tile])
            if self.weight_VH is not None:
                add_turned(self.weight_VH[tile], g_CT, h_CH)
        if self.hidden_RH is not None:
            self.hidden_RH[rows] = grad_CH.div_(self.times)

    def hold(self, times: Tensor | float) -> None:
        """Multiplies what is summed up, which is exact, so that it is held `times` times."""
        for held in (self.weight_VH, self.bias_V):
            if held is not None and times is not self.times:
                held.mul_(times / self.times)
        self.times = times


def _power(slopes_C: Tensor) -> Tensor:
    """The power of two that brings the largest of these into [2^9, 2^10): float16 then holds what
    is 2^33 times smaller, and a projection's scale does not overflow it."""
    _, exponent = torch.frexp(slopes_C.abs().amax())
    return torch.ldexp(slopes_C.new_ones(()), (10 - exponent).clamp(-30, 30))


def wide(hidden_RH: Tensor) -> torch.dtype:
    """In which their gradient waits for the factor of the loss."""
    return torch.float32 if hidden_RH.dtype == torch.float16 else hidden_RH.dtype
