"""A chunk of rows against the whole vocabulary: its cross-entropy, and then its gradient.

The logits are made a tile of the vocabulary at a time and become exponentials while the tile is
still in the processor's cache; what is kept is e = exp(z - reference), of which the gradient is a
product away. For a GPU see wholechunk.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prift.fold import Fold
from prift.heads import Head
from prift.stats import TokenStats

_TILE_COLUMNS = 2048
_LARGE = 1e25  # of a row's sum: beyond, a weight over it comes near float32's smallest numbers


class Chunk:
    """C rows of hidden states and their targets.

    nll_C  float32 [C]: -log p of each target
    keep   whether the exponentials are kept for `gradients`
    """

    def __init__(self, head: Head, hidden_CH: Tensor, targets_C: Tensor, keep: bool = True):
        self.head, self.hidden_CH, self.targets_C = head, hidden_CH, targets_C
        C, V = len(targets_C), len(head.weight)
        width = max(1, min(V, _TILE_COLUMNS))
        self._tiles = [slice(i, min(i + width, V)) for i in range(0, V, width)]
        size = C * (V if keep else width)
        self._kept = torch.empty(size, dtype=torch.float32, device=hidden_CH.device)
        self._stride = C * width if keep else 0
        own_C = self._exponentials(None)
        if not ((self._total_C < _LARGE) & (self._total_C > 0)).all():
            own_C = self._exponentials(self._largest())
        self.nll_C = (self._total_C.log() - (own_C.double() - self._reference_C)).float()

    def _tile(self, number: int) -> Tensor:
        """[C, columns] of the buffer."""
        tile = self._tiles[number]
        shape = len(self.targets_C), tile.stop - tile.start
        begin = number * self._stride
        return self._kept[begin : begin + shape[0] * shape[1]].view(shape)

    def _inside(self, tile: slice) -> tuple[Tensor, Tensor]:
        """(rows whose target lies in this tile, its column there)."""
        rows = ((self.targets_C >= tile.start) & (self.targets_C < tile.stop)).nonzero()[:, 0]
        return rows, self.targets_C[rows] - tile.start

    def _exponentials(self, reference_C: Tensor | None) -> Tensor:
        """Fills the tiles with exp(z - reference) and sums them up; the targets' logits [C].

        reference_C  None: the largest logit of the first tile, which need not be the row's; only
                     where it is less by far more than usual do the exponentials overflow
        """
        own_C = torch.empty_like(self.targets_C, dtype=torch.float32)
        total_C = torch.zeros_like(own_C, dtype=torch.float64)
        for number, tile in enumerate(self._tiles):
            z_CT = self.head.part(tile).logits(self.hidden_CH, self._tile(number))
            rows, columns = self._inside(tile)
            own_C[rows] = z_CT[rows, columns]
            if reference_C is None:
                reference_C = z_CT.amax(1)
            total_C += z_CT.sub_(reference_C[:, None]).exp_().sum(1)
        self._reference_C, self._total_C = reference_C, total_C
        return own_C

    def _largest(self) -> Tensor:
        """The largest logit of each row [C]."""
        tops = [
            self.head.part(tile).logits(self.hidden_CH, self._tile(number)).amax(1)
            for number, tile in enumerate(self._tiles)
        ]
        return torch.stack(tops).amax(0)

    def stats(self, names: Sequence[str]) -> TokenStats:
        """Statistics [C] of the targets, whose logits are made once more: ties and ranks need them
        as they were."""
        return Fold(self.head, names=names)(self.hidden_CH, self.targets_C)

    def gradients(self, weights_C: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(tile, gradient [C, columns] of sum(weights * nll) at the raw projection), once."""
        scale_C1 = (weights_C / self._total_C).float()[:, None]
        for number, tile in enumerate(self._tiles):
            e_CT = self._tile(number)
            z_CT = None
            if self.head.softcap is not None:
                z_CT = (e_CT.log() + self._reference_C[:, None]).clamp_min_(-self.head.softcap)
            g_CT = e_CT.mul_(scale_C1)
            rows, columns = self._inside(tile)
            g_CT[rows, columns] -= weights_C[rows]
            yield tile, self.head.chain(g_CT, z_CT)
