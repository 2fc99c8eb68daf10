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

import torch
from torch import Tensor

from prift.heads import Head
from prift.stats import CORE, TokenStats, is_deep, stats_of_sums, tile_sums, token_stats

_ROWS = 512  # of a block on a CPU
_TILE_COLUMNS = {True: 2048, False: 512}  # compiled or not: what passes over a tile stays cached
_ROW_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}  # of a block of whole float32 rows
_WHOLE = {"expected_rank", "entropy_top20"}  # what no sum over tiles gives
_FAR = 20.0  # of log S: entropy = log S - T / S loses digits where the reference is far below


@functools.cache
def compiled_sums(device: str = "cpu") -> Callable[..., Tensor]:
    """`tile_sums` in one pass, by torch.compile, tried on this kind of device. Raises what a
    machine without compiler raises."""
    compiled = torch.compile(tile_sums, dynamic=True)

    def sums(z_RC: Tensor, target_R1: Tensor, reference_R1: Tensor, squares: bool) -> Tensor:
        # Sizes of 0 and 1 would each be compiled anew.
        function = compiled if min(z_RC.shape) > 1 else tile_sums
        return function(z_RC, target_R1, reference_R1, squares)

    z, column = torch.randn(4, 40, device=device), torch.zeros(4, 1, device=device)
    expected = tile_sums(z, column, column, False)
    torch.testing.assert_close(sums(z, column, column, False), expected, rtol=1e-5, atol=0)
    return sums


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
        if _WHOLE & set(self.names):
            return functools.partial(self._whole_rows, hidden_NH, targets_N)
        size = self._rows() if hidden_NH.is_cuda else _ROWS
        blocks = [
            self._block(hidden_NH[i : i + size], targets_N[i : i + size])
            for i in range(0, max(len(targets_N), 1), size)
        ]
        stats = TokenStats.concatenate(s for s, _ in blocks)
        sure_N = torch.cat([sure for _, sure in blocks])
        return functools.partial(self._mend, stats, sure_N, hidden_NH, targets_N)

    def _mend(
        self, stats: TokenStats, sure_N: Tensor, hidden_NH: Tensor, targets_N: Tensor
    ) -> TokenStats:
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
        if weight.is_cuda and (self.sums is tile_sums or _WHOLE & set(self.names)):
            room //= 4  # several copies of the block
        return max(1, room // (4 * len(weight)))

    def _block(self, hidden_RH: Tensor, targets_R: Tensor) -> tuple[TokenStats, Tensor]:
        """(statistics, bool [R] whether they are sure) of one block, folded over tiles."""
        head, V = self.head, len(self.head.weight)
        compiled = self.sums is not tile_sums
        width = V if hidden_RH.is_cuda else min(V, _TILE_COLUMNS[compiled])
        buffer = self._buffer(len(targets_R), width, hidden_RH.device)
        found_R, guess_R, reference_R = torch.empty(0), torch.empty(0), torch.empty(0)
        total = torch.zeros(())
        for begin in range(0, V, width):
            tile = slice(begin, min(begin + width, V))
            z_RC = self._logits(head.part(tile), hidden_RH, buffer)
            own_R = (targets_R - begin).clamp(0, z_RC.shape[1] - 1)
            here_R = z_RC.gather(1, own_R[:, None])[:, 0].float()
            if begin == 0:
                guess_R = here_R if width == V else self._target_logits(hidden_RH, targets_R)
                found_R = here_R
                # Any logit of the row will do that is not far below the largest.
                reference_R = torch.maximum(guess_R, z_RC[:, : _TILE_COLUMNS[True]].amax(1).float())
            inside_R = (targets_R >= begin) & (targets_R < begin + width)
            found_R = torch.where(inside_R, here_R, found_R)
            sums = self.sums(
                z_RC, guess_R[:, None], reference_R[:, None], "collision" in self.names
            )
            total = sums if begin == 0 else total + sums
        stats = stats_of_sums(total, guess_R, reference_R, V)
        log_total = (total[0] + total[1]).log()
        sure_R = (found_R == guess_R) & (log_total < _FAR) & ~is_deep(guess_R, reference_R)
        return stats, sure_R

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
