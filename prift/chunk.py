"""A chunk of rows against the whole vocabulary: its cross-entropy, and then its gradient.

The logits are made a tile of the vocabulary at a time and become exponentials while the tile is
still in the processor's cache; what is kept is e = exp(z - reference), of which the gradient is a
product away. The same pass takes the statistics that rules online ask for, all but expected_rank.
For a GPU see wholechunk.py.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prift.errors import first_line
from prift.extended import TOP, TOP_GROUP, entropy_of_top
from prift.fold import Block, Fold, compiled_sums, trial
from prift.heads import Head
from prift.stats import CORE, TokenStats, tile_sums

_TILE_COLUMNS = 2048
_LARGE = 1e25  # of a row's sum: beyond, a weight over it comes near float32's smallest numbers
_WORTH_COMPILING = 16_384  # tokens of a vocabulary: with fewer the pass is a small share of a step


@functools.cache
def sums_for(vocabulary: int) -> tuple[Callable[..., Tensor], str | None]:
    """(what takes the sums over a tile, why it is not compiled where that would be worth it)."""
    if vocabulary < _WORTH_COMPILING:
        return tile_sums, None
    try:
        with torch.no_grad():  # as in an autograd function
            found, tried = compiled_sums(), trial("cpu")
            e_RC, expected_RC = torch.empty_like(tried[0]), torch.empty_like(tried[0])
            sums = found(*tried, False, e_RC)
            wanted = tile_sums(*tried, False, expected_RC)
        torch.testing.assert_close((sums, e_RC), (wanted, expected_RC), rtol=1e-5, atol=0)
        return found, None
    except Exception as error:  # whatever a machine's compilers and their caches may raise
        return tile_sums, f"torch.compile failed ({type(error).__name__}: {first_line(error)})"


class Chunk:
    """C rows of hidden states and their targets.

    nll_C  float32 [C]: -log p of each target
    keep   whether the exponentials are kept for `gradients`
    names  statistics that `stats` will be asked for
    """

    def __init__(
        self,
        head: Head,
        hidden_CH: Tensor,
        targets_C: Tensor,
        keep: bool = True,
        names: Sequence[str] = (),
    ):
        self.head, self.hidden_CH, self.targets_C = head, hidden_CH, targets_C
        self._fold = Fold(head, names=names, sums=sums_for(len(head.weight))[0])
        self._kept, self._maxima = None, []
        if keep or "entropy_top20" in names:
            size = len(targets_C) * len(head.weight)
            self._kept = torch.empty(size, dtype=torch.float32, device=hidden_CH.device)
        block = self._folded(None)
        if not ((block.total() < _LARGE) & (block.total() > 0)).all():
            block = self._folded(self._largest())
        self._block, self._total_C = block, block.total()
        self.nll_C = (self._total_C.log() - (block.own_R.double() - block.reference_R)).float()

    def _tiles(self) -> Iterator[slice]:
        V = len(self.head.weight)
        return (slice(i, min(i + _TILE_COLUMNS, V)) for i in range(0, V, _TILE_COLUMNS))

    def _tile(self, tile: slice) -> Tensor:
        """[C, columns] of what is kept."""
        C = len(self.targets_C)
        return self._kept[C * tile.start : C * tile.stop].view(C, tile.stop - tile.start)

    def _folded(self, reference_C: Tensor | None) -> Block:
        """Fills the tiles with exp(z - reference) and sums them up.

        reference_C  None: Fold's choice, which need not be the row's largest logit; only where it
                     is less by far more than usual do the exponentials overflow
        """
        self._maxima.clear()
        return self._fold.block(
            self.hidden_CH,
            self.targets_C,
            width=_TILE_COLUMNS,
            reference_R=reference_C,
            take=self._take,
        )

    def _take(self, tile: slice, z_CT: Tensor, target_C1: Tensor, reference_C1: Tensor) -> Tensor:
        e_CT = None if self._kept is None else self._tile(tile)
        sums = self._fold.take(tile, z_CT, target_C1, reference_C1, e_CT)
        if "entropy_top20" in self._fold.names and z_CT.shape[1] == _TILE_COLUMNS:
            self._maxima.append(e_CT.unflatten(1, (TOP_GROUP, -1)).amax(1))
        return sums

    def _largest(self) -> Tensor:
        """The largest logit of each row [C]."""
        tops = [self.head.part(tile).logits(self.hidden_CH).amax(1) for tile in self._tiles()]
        return torch.stack(tops).amax(0)

    def stats(self, names: Sequence[str]) -> TokenStats:
        """Statistics [C] of the targets: the core, and those that were announced, among which
        `names` must be. Where whole rows are sorted, their logits are made once more."""
        fold = self._fold
        assert set(names) <= {*CORE, *fold.names}
        if "expected_rank" in fold.names:
            return fold(self.hidden_CH, self.targets_C)
        stats, sure_C = self._block.stats()
        if "entropy_top20" in fold.names:
            stats = replace(stats, entropy_top20=entropy_of_top(self._top().double().log()))
        return fold.mend(stats, sure_C, self.hidden_CH, self.targets_C)

    def _top(self) -> Tensor:
        """[C, 20]: the largest exponentials of each row, or all; `extended.largest` over tiles."""
        C, whole, found = len(self.targets_C), len(self._maxima), []
        if whole:
            maxima_CG = torch.cat(self._maxima, 1)
            groups = maxima_CG.shape[1] // whole
            best = maxima_CG.topk(TOP, 1).indices[:, :, None]
            columns = best % groups + groups * torch.arange(TOP_GROUP)
            tiles = self._kept[: whole * C * _TILE_COLUMNS].view(whole, C, _TILE_COLUMNS)
            found.append(tiles[best // groups, torch.arange(C)[:, None, None], columns].flatten(1))
        rest = slice(whole * _TILE_COLUMNS, len(self.head.weight))
        if rest.start < rest.stop:
            found.append(self._tile(rest))
        e_CK = torch.cat(found, 1)
        return e_CK.topk(min(TOP, e_CK.shape[1]), 1).values

    def gradients(self, weights_C: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(tile, gradient [C, columns] of sum(weights * nll) at the raw projection), once."""
        scale_C1 = (weights_C / self._total_C).float()[:, None]
        for tile in self._tiles():
            e_CT, z_CT = self._tile(tile), None
            if self.head.softcap is not None:
                z_CT = (e_CT.log() + self._block.reference_R[:, None]).clamp_min_(
                    -self.head.softcap
                )
            g_CT = e_CT.mul_(scale_C1)
            inside_C = (self.targets_C >= tile.start) & (self.targets_C < tile.stop)
            rows = inside_C.nonzero()[:, 0]
            g_CT[rows, self.targets_C[rows] - tile.start] -= weights_C[rows]
            yield tile, self.head.chain(g_CT, z_CT)
