"""Statistics of label tokens straight from hidden states, at the price of the projection.

The output projection of a block of rows is made one tile of the vocabulary at a time and folded at
once into running sums, so that on a CPU a row of logits never exists. On a GPU a tile is the whole
vocabulary of fewer rows.

Comparisons need the target's logit before its tile is reached, and to the bit: it comes from a
product of the same rows with the targets' own columns, which sums in the same order. When the
target's tile is reached its value there is compared with that. Rows in which the two differ, and
rows whose sums left float32's range around their reference, are done again from whole rows of
logits (`stats.token_stats`), where target and competitors come out of one product. So no result
rests on an assumption about the matrix library; only speed does.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prift.extended import WHOLE_ROW
from prift.heads import Head
from prift.stats import CORE, TokenStats, is_deep, stats_of_sums, tile_sums, token_stats

_ROWS = 512  # of a block on a CPU
_TILE_COLUMNS = {True: 2048, False: 512}  # compiled or not: what passes over a tile stays cached
_ROW_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}  # of a block of whole float32 rows
_TRIED = (512, 2048)
_FAR = 20.0  # of log S: entropy = log S - T / S loses digits where the reference is far below


@functools.cache
def compiled_sums(device: str = "cpu") -> Callable[..., Tensor]:
    """`tile_sums` in one pass, by torch.compile, tried on this kind of device. Gradients and
    inference mode should be on or off as they will be where it is used, else it is compiled anew
    there. Raises what a machine without compiler raises."""
    compiled = torch.compile(tile_sums, dynamic=True)

    def sums(z_RC: Tensor, *others: Any) -> Tensor:
        # Sizes of 0 and 1 would each be compiled anew.
        function = compiled if min(z_RC.shape) > 1 else tile_sums
        return function(z_RC, *others)

    tried, squares = trial(device), False
    torch.testing.assert_close(sums(*tried, squares), tile_sums(*tried, squares), rtol=1e-5, atol=0)
    return sums


def trial(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets' logits and reference, of as many rows as make a pass compile for several
    threads; no random numbers are drawn."""
    rows, columns = _TRIED
    z_RC = torch.linspace(-3, 3, rows * columns, device=device).view(_TRIED)
    return z_RC, torch.zeros(rows, 1, device=device), torch.ones(rows, 1, device=device)


@dataclass(frozen=True)
class Fold:
    """Statistics of rows of hidden states.

    head          of the model that made them
    logits_dtype  'float32', or 'bfloat16' for the rounding of the PriFT authors' code
    names         statistics: the core, and those of EXTENDED that are named
    sums          `tile_sums` or `compiled_sums()`
    """

    head: Head
    logits_dtype: str = "float32"
    names: Sequence[str] = CORE
    sums: Callable[..., Tensor] = tile_sums

    def __call__(self, hidden_NH: Tensor, targets_N: Tensor) -> TokenStats:
        """Statistics [N] of targets int64 [N], on their device; NaN logprob where the logits are
        no distribution."""
        return self.launch(hidden_NH, targets_N)()

    def launch(self, hidden_NH: Tensor, targets_N: Tensor) -> Callable[[], TokenStats]:
        """The same in two steps: a GPU is given its work now (the core's), and waited for in the
        call."""
        hidden_NH = hidden_NH.to(self.head.weight.device)
        targets_N = targets_N.to(hidden_NH.device)
        if WHOLE_ROW.keys() & set(self.names):
            return functools.partial(self._whole_rows, hidden_NH, targets_N)
        size = self._rows() if hidden_NH.is_cuda else _ROWS
        blocks = [
            self.block(hidden_NH[i : i + size], targets_N[i : i + size]).stats()
            for i in range(0, max(len(targets_N), 1), size)
        ]
        stats = TokenStats.concatenate(s for s, _ in blocks)
        sure_N = torch.cat([sure for _, sure in blocks])
        return functools.partial(self.mend, stats, sure_N, hidden_NH, targets_N)

    def mend(
        self, stats: TokenStats, sure_N: Tensor, hidden_NH: Tensor, targets_N: Tensor
    ) -> TokenStats:
        """The statistics, of which rows that are not sure are done again from whole rows."""
        rows = (~sure_N).nonzero()[:, 0]
        if len(rows):
            stats.put(rows, self._whole_rows(hidden_NH[rows], targets_N[rows]))
        return stats

    def _whole_rows(self, hidden_NH: Tensor, targets_N: Tensor) -> TokenStats:
        """Each row's logits in one product, a few rows at a time."""
        size = self._rows()
        return TokenStats.concatenate(
            token_stats(
                self._logits(self.head, hidden_NH[i : i + size]),
                targets_N[i : i + size],
                self.names,
                sums=self.sums,
            )
            for i in range(0, max(len(targets_N), 1), size)
        )

    def _rows(self) -> int:
        weight = self.head.weight
        room = _ROW_BYTES.get(weight.device.type, 256 << 20)
        if weight.is_cuda and (self.sums is tile_sums or WHOLE_ROW.keys() & set(self.names)):
            room //= 4  # several copies of the block
        return max(1, room // (4 * len(weight)))

    def block(
        self,
        hidden_RH: Tensor,
        targets_R: Tensor,
        *,
        width: int | None = None,
        reference_R: Tensor | None = None,
        take: Callable[[slice, Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> "Block":
        """R rows folded over tiles of the vocabulary.

        width        columns of a tile; by default what suits the device
        reference_R  float32 [R]: what exponentials are taken around; by default the target's logit
                     or the largest of the first tile
        take         (tile of the vocabulary, its logits, targets', reference) -> its sums, in
                     place of `take`, for who wants more of it while it is cached
        """
        head, V = self.head, len(self.head.weight)
        if width is None:
            width = V if hidden_RH.is_cuda else _TILE_COLUMNS[self.sums is not tile_sums]
        width = min(V, width)
        buffer = self._buffer(len(targets_R), width, hidden_RH.device)
        own_R, compared_R, total = torch.empty(0), torch.empty(0), torch.zeros(())
        for begin in range(0, V, width):
            tile = slice(begin, min(begin + width, V))
            z_RC = self._logits(head.part(tile), hidden_RH, buffer)
            column_R = (targets_R - begin).clamp(0, z_RC.shape[1] - 1)
            here_R = z_RC.gather(1, column_R[:, None])[:, 0].float()
            if begin == 0:
                own_R = here_R
                compared_R = here_R if width == V else self._target_logits(hidden_RH, targets_R)
                if reference_R is None:
                    # Any logit of the row will do that is not far below the largest.
                    first_R = z_RC[:, : _TILE_COLUMNS[True]].amax(1).float()
                    reference_R = torch.maximum(compared_R, first_R)
            inside_R = (targets_R >= begin) & (targets_R < tile.stop)
            own_R = torch.where(inside_R, here_R, own_R)
            sums = (take or self.take)(tile, z_RC, compared_R[:, None], reference_R[:, None])
            total = sums if begin == 0 else total + sums
        return Block(total, own_R, compared_R, reference_R, V)

    def take(
        self,
        tile: slice,
        z_RC: Tensor,
        target_R1: Tensor,
        reference_R1: Tensor,
        out_RC: Tensor | None = None,
    ) -> Tensor:
        """`sums` of the logits of a tile, those that `names` need; its exponentials in `out_RC`."""
        return self.sums(z_RC, target_R1, reference_R1, "collision" in self.names, out_RC)

    def _target_logits(self, hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
        """float32 [R], as the tiles will have them."""
        size = 64  # rows x targets, of which only the diagonal is wanted
        parts = [
            self._logits(self.head.part(targets_R[i : i + size]), hidden_RH[i : i + size])
            for i in range(0, len(targets_R), size)
        ]
        return torch.cat([part.diagonal() for part in parts]).float()

    def _logits(self, head: Head, hidden_RH: Tensor, buffer: Tensor | None = None) -> Tensor:
        """[R, C] of the logits' dtype, in `buffer` where that is given."""
        if self.logits_dtype == "bfloat16":
            return head.rounded(hidden_RH)
        if buffer is None:
            return head.logits(hidden_RH)
        R, C = len(hidden_RH), len(head.weight)
        return head.logits(hidden_RH, buffer[: R * C].view(R, C))

    def _buffer(self, rows: int, width: int, device: torch.device) -> Tensor | None:
        if self.logits_dtype == "bfloat16":
            return None
        return torch.empty(rows * width, device=device)


@dataclass(frozen=True, slots=True)
class Block:
    """R rows of logits, folded over the vocabulary of V tokens.

    sums         float64 [5 or 6, R], of `stats.tile_sums`
    own_R        float32 [R], the targets' logits out of their tiles
    compared_R   float32 [R], what logits were compared with: the same, if rows are sure
    reference_R  float32 [R], what exponentials were taken around
    """

    sums: Tensor
    own_R: Tensor
    compared_R: Tensor
    reference_R: Tensor
    V: int

    def total(self) -> Tensor:
        """float64 [R], the sum of exp(z - reference) over the vocabulary."""
        return self.sums[0] + self.sums[1]

    def stats(self) -> tuple[TokenStats, Tensor]:
        """(statistics [R], bool [R] whether they are sure)."""
        stats = stats_of_sums(self.sums, self.compared_R, self.reference_R, self.V)
        near_R = self.total().log() < _FAR
        deep_R = is_deep(self.compared_R, self.reference_R)
        return stats, (self.own_R == self.compared_R) & near_R & ~deep_R
