"""A chunk of rows against the whole vocabulary whose logits lie in memory whole: what a GPU does.

Like chunk.Chunk in what it gives, other in how: the logits stay as they are, what is summed up and
what becomes of them are one compiled pass each, and nothing waits for the device, so that Python
stays ahead of it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prift.errors import first_line
from prift.fold import compiled_sums
from prift.heads import Head
from prift.stats import TokenStats, tile_sums, token_stats


def sums(z_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest logit of each row [C], the sum of exp(z - largest) [C])."""
    top_C = z_CV.amax(1)
    return top_C, (z_CV - top_C[:, None]).exp().sum(1)


def slopes(
    z_CV: Tensor,
    top_C: Tensor,
    scale_C: Tensor,
    targets_C: Tensor,
    own_C: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """[C, V]: exp(z - top) * scale, less `own` in the targets' columns."""
    g_CV = (z_CV - top_C[:, None]).exp() * scale_C[:, None]
    columns_V = torch.arange(z_CV.shape[1], device=z_CV.device)
    return torch.where(columns_V == targets_C[:, None], g_CV - own_C[:, None], g_CV).to(dtype)


def plain_slopes(
    z_CV: Tensor,
    top_C: Tensor,
    scale_C: Tensor,
    targets_C: Tensor,
    own_C: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`slopes`, in the fewest passes where nothing fuses them."""
    g_CV = torch.sub(z_CV, top_C[:, None]).exp_().mul_(scale_C[:, None])
    return g_CV.scatter_add_(1, targets_C[:, None], -own_C[:, None]).to(dtype)


@dataclass(frozen=True)
class Passes:
    """What goes over the logits: `sums`, `slopes` and stats.tile_sums, compiled or not.

    refusal  why they are not compiled, or None
    """

    sums: Callable[..., tuple[Tensor, Tensor]] = sums
    slopes: Callable[..., Tensor] = plain_slopes
    tile_sums: Callable[..., Tensor] = tile_sums
    refusal: str | None = None


@functools.cache
@torch.no_grad()  # as in an autograd function
def passes(kind: str) -> Passes:
    """Compiled for this kind of device, where that works: tried on a few rows."""
    try:
        found = Passes(
            torch.compile(sums, dynamic=True),
            torch.compile(slopes, dynamic=True),
            compiled_sums(kind),
        )
        z = torch.linspace(-3, 3, 160, device=kind).view(4, 40)
        given = torch.linspace(0.1, 1, 4, device=kind)
        targets = torch.tensor([0, 7, 39, 11], device=kind)
        for dtype in (torch.float32, torch.bfloat16):
            arguments = z, z.amax(1), given, targets, given, dtype
            expected = plain_slopes(*arguments)
            torch.testing.assert_close(found.slopes(*arguments), expected)
        torch.testing.assert_close(found.sums(z), sums(z))
    except Exception as error:  # whatever a machine's compilers and their caches may raise
        return Passes(refusal=f"{type(error).__name__}: {first_line(error)}")
    return found


class WholeChunk:
    """C rows of hidden states and their targets.

    nll_C  float32 [C]: -log p of each target
    """

    def __init__(
        self, head: Head, hidden_CH: Tensor, targets_C: Tensor, made: Passes | None = None
    ):
        self.head, self.hidden_CH, self.targets_C = head, hidden_CH, targets_C
        self._passes = passes(hidden_CH.device.type) if made is None else made
        self._z_CV = head.logits(hidden_CH)
        own_C = self._z_CV.gather(1, targets_C[:, None])[:, 0].double()
        self._top_C, self._total_C = self._passes.sums(self._z_CV)
        self.nll_C = (self._total_C.double().log() - (own_C - self._top_C)).float()

    def stats(self, names: Sequence[str]) -> TokenStats:
        """Statistics [C] of the targets: the core, and those of EXTENDED in `names`."""
        return token_stats(self._z_CV, self.targets_C, names, sums=self._passes.tile_sums)

    def gradients(self, weights_C: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(all columns, gradient [C, V] of sum(weights * nll) at the raw projection), once. In the
        hidden states' dtype where nothing more is to be done with it, else in float32."""
        head = self.head
        done = head.softcap is None and head.scale == 1.0 and head.bias is None
        dtype = self.hidden_CH.dtype if done else torch.float32
        scale_C = weights_C / self._total_C
        g_CV = self._passes.slopes(
            self._z_CV, self._top_C, scale_C, self.targets_C, weights_C, dtype
        )
        z_CV = self._z_CV if head.softcap is not None else None
        yield slice(0, g_CV.shape[1]), g_CV if done else head.chain(g_CV, z_CV)
