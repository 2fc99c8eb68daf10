"""Examples with the prior's statistics beside them, as torch datasets and batches.

Where weights are known beforehand, what no gradient comes from is not run: a sequence ends at the
position that predicts its last token of nonzero weight, and one without such a token is left out.
A batch says how many label tokens it had before, since the loss divides by all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prift.examples import Examples
from prift.mapped import MappedArrays
from prift.packing import laid_end_to_end
from prift.stats import TokenStats
from prift.weigher import Weigher

_CHUNK = 8192  # examples weighed at once


class PriorDataset(torch.utils.data.Dataset):
    """One item per example: what of it is run.

    examples  the examples
    prior     statistics by name, flat over all label tokens of all examples in order; may be empty
    weigher   a rule whose source is the prior: sequences are cut by its weights. None: nothing is

    An item has input_ids (int32 [T]), places and targets (int64 and int32 [N], its label tokens),
    prior (each statistic [N]), index, and num_labels, counted before anything was cut. Label tokens
    stand at places, which may end with T itself: what it predicts needs no token itself to be run.

    lengths   int64: T of each item; 0 where no token has a weight
    """

    def __init__(
        self,
        examples: Examples,
        prior: Mapping[str, np.ndarray],
        weigher: Weigher | None = None,
    ):
        self.examples, self.prior = examples, prior
        self.lengths, self._counts = examples.lengths, examples.label_counts
        self._kept, self._begins = self._counts, np.cumsum(self._counts) - self._counts
        if weigher is not None:
            self._kept = np.concatenate([self._weigh(weigher, s) for s in self._chunks()])
            items = zip(examples, self._kept.tolist(), strict=True)
            last = [np.flatnonzero(e.label_mask)[kept - 1] if kept else 0 for e, kept in items]
            self.lengths = np.array(last, np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._item(index, self.lengths[index], self._kept[index])

    def whole(self, index: int) -> dict[str, Any]:
        """The item with nothing cut off."""
        return self._item(index, None, self._counts[index])

    def close(self) -> None:
        """Lets go of files, where the statistics are in files."""
        if isinstance(self.prior, MappedArrays):
            self.prior.close()

    def _item(self, index: int, size: int | None, kept: int) -> dict[str, Any]:
        example, begin = self.examples[index], self._begins[index]
        places = np.flatnonzero(example.label_mask)[:kept]
        return {
            "input_ids": example.input_ids[:size],
            "places": places,
            "targets": example.input_ids[places],
            "prior": {name: values[begin : begin + kept] for name, values in self.prior.items()},
            "num_labels": int(self._counts[index]),
            "index": int(index),
        }

    def _chunks(self) -> list[slice]:
        return [slice(i, i + _CHUNK) for i in range(0, len(self), _CHUNK)]

    def _weigh(self, weigher: Weigher, chunk: slice) -> np.ndarray:
        """int64 [chunk]: label tokens of each example up to its last of nonzero weight."""
        begins, counts = self._begins[chunk], self._counts[chunk]
        own = slice(begins[0], begins[-1] + counts[-1])
        values = {n: torch.from_numpy(self.prior[n][own].copy()) for n in weigher.needs}
        sequence = torch.arange(len(counts)).repeat_interleave(torch.from_numpy(counts))
        weights = weigher(TokenStats(**values), sequence).expand(own.stop - own.start).numpy()
        nonzero = np.concatenate([[-1], np.flatnonzero(weights) + own.start])
        last = nonzero[np.searchsorted(nonzero, begins + counts) - 1]
        return np.maximum(last + 1 - begins, 0)


def collate(items: Sequence[Mapping[str, Any]], packed: bool = False) -> dict[str, Any]:
    """A batch: what the model's forward takes, its label tokens, and what was counted.

    input_ids, attention_mask, position_ids  int64 [B, T], padded on the right; packed: [1, T], the
                   sequences end to end, with where they end, as transformers names it:
                   cu_seq_lens_q (int32 [B + 1]) and max_length_q
    tokens, prior  fields of `forward.LabelTokens` and statistics by name, of N label tokens
    num_labels     of all items
    index          of each sequence, and behind them of the items that are not run

    Where there is nothing to run, one token is, without a label: every process takes every step.
    """
    items = sorted(items, key=lambda item: not len(item["input_ids"]))
    run = [item for item in items if len(item["input_ids"])]
    run = run or [{**items[0], "input_ids": np.zeros(1, np.int32)}]
    sizes = np.array([len(item["input_ids"]) for item in run])
    joined = np.concatenate([item["input_ids"] for item in run]).astype(np.int64)
    if packed:
        ends, places = laid_end_to_end(sizes)
        begins, mask = ends[:-1], np.ones((1, len(places)), np.int64)
        ids, positions = joined[None], places[None]
        more = {"cu_seq_lens_q": torch.from_numpy(ends), "max_length_q": int(sizes.max())}
    else:
        longest = int(sizes.max())
        begins, more = np.arange(len(run)) * longest, {}
        positions = np.tile(np.arange(longest), (len(run), 1))
        mask = (positions < sizes[:, None]).astype(np.int64)
        ids = np.zeros_like(positions)
        ids[mask == 1] = joined
    sequence = np.repeat(np.arange(len(run)), [len(item["places"]) for item in run])
    tokens = {
        "place": begins[sequence] + np.concatenate([item["places"] for item in run]) - 1,
        "target": np.concatenate([item["targets"] for item in run]).astype(np.int64),
        "sequence": sequence,
    }
    prior = {n: np.concatenate([item["prior"][n] for item in run]) for n in run[0]["prior"]}
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(positions),
        **more,
        "tokens": {name: torch.from_numpy(array) for name, array in tokens.items()},
        "prior": {name: torch.from_numpy(array) for name, array in prior.items()},
        "num_labels": sum(item["num_labels"] for item in items),
        "index": [item["index"] for item in items],
    }
