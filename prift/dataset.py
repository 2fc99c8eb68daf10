"""Examples with the prior's statistics beside them, as torch datasets and batches.

Where weights are known beforehand, what no gradient comes from is not run: a sequence ends at the
position that predicts its last token of nonzero weight, and one without such a token is left out.
A batch says what it adds to the denominator of the loss, which counts what was cut off.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prift.mapped import MappedArrays
from prift.normalizers import DENOMINATORS
from prift.packing import laid_end_to_end
from prift.text.examples import Examples
from prift.weighing import kept


class PriorDataset(torch.utils.data.Dataset):
    """One item per example: what of it is run.

    examples   the examples
    prior      statistics by name, flat over all label tokens of all examples in order; may be
               empty. Among them 'weights' (float32), where the prior's decide them
    cut        whether sequences are cut by those weights
    normalize  what the loss is divided by: one of normalizers.DENOMINATORS
    weights    float32, flat likewise: where they are known beforehand and not among `prior`

    An item has input_ids (int32 [T]), places, targets and roles (int64, int32 and uint8 [N], of its
    label tokens), prior and weights (each [N]), scale (of its loss), index, and, counted before
    anything was cut, num_labels and denominator. Label tokens stand at places, which may end with T
    itself: what it predicts needs no token itself to be run.

    lengths   int64: T of each item; 0 where no token has a weight
    """

    def __init__(
        self,
        examples: Examples,
        prior: Mapping[str, np.ndarray],
        cut: bool = False,
        normalize: str = "tokens",
        weights: np.ndarray | None = None,
    ):
        self.examples, self.prior, self.normalize = examples, prior, normalize
        self._weights = prior.get("weights") if weights is None else weights
        self._names = [n for n in prior if n != "weights"]
        self._denominator, self._each = DENOMINATORS[normalize], normalize == "sequence"
        self.lengths, self._counts = examples.lengths, examples.label_counts
        self._kept, self._begins = self._counts, np.cumsum(self._counts) - self._counts
        if cut:
            self._kept = kept(self._weights, self._counts)
            items = zip(examples, self._kept.tolist(), strict=True)
            last = [np.flatnonzero(e.label_mask)[n - 1] if n else 0 for e, n in items]
            self.lengths = np.array(last, np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._item(index, self.lengths[index], self._kept[index])

    def whole(self, index: int) -> dict[str, Any]:
        """The item with nothing cut off."""
        return self._item(index, None, self._counts[index])

    @property
    def weighed(self) -> bool:
        """Whether the weights are known."""
        return self._weights is not None

    def close(self) -> None:
        """Lets go of files, where the statistics are in files."""
        if isinstance(self.prior, MappedArrays):
            self.prior.close()

    def _item(self, index: int, size: int | None, kept: int) -> dict[str, Any]:
        example, begin, count = self.examples[index], self._begins[index], self._counts[index]
        places = np.flatnonzero(example.label_mask)[:kept]
        own = slice(begin, begin + kept)
        item = {
            "input_ids": example.input_ids[:size],
            "places": places,
            "targets": example.input_ids[places],
            "roles": example.roles[places],
            "prior": {name: self.prior[name][own] for name in self._names},
            "scale": 1 / count if self._each else 1.0,
            "num_labels": int(count),
            "index": int(index),
        }
        if self._weights is None:
            return item | {"denominator": 1 if self._each else int(count)}
        whole = self._weights[begin : begin + count]
        return item | {"weights": whole[:kept], "denominator": self._denominator(whole)}


def collate(items: Sequence[Mapping[str, Any]], packed: bool = False) -> dict[str, Any]:
    """A batch: what the model's forward takes, its label tokens, and what was counted.

    input_ids, attention_mask, position_ids  int64 [B, T], padded on the right; packed: [1, T], the
                   sequences end to end, with where they end, as transformers names it:
                   cu_seq_lens_q (int32 [B + 1]) and max_length_q
    tokens, prior  fields of `forward.LabelTokens` and statistics by name, of N label tokens
    weights, scale  float32 [N]: weights where they are known, and a factor of each token's loss
    num_labels, denominator  of all items
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
        "role": np.concatenate([item["roles"] for item in run]),
    }
    prior = {n: np.concatenate([item["prior"][n] for item in run]) for n in run[0]["prior"]}
    scale = np.array([item["scale"] for item in run], np.float32)[sequence]
    if "weights" in run[0]:
        more["weights"] = torch.from_numpy(np.concatenate([item["weights"] for item in run]))
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(positions),
        **more,
        "tokens": {name: torch.from_numpy(array) for name, array in tokens.items()},
        "prior": {name: torch.from_numpy(array) for name, array in prior.items()},
        "scale": torch.from_numpy(scale),
        "num_labels": sum(item["num_labels"] for item in items),
        "denominator": sum(item["denominator"] for item in items),
        "index": [item["index"] for item in items],
    }
