"""Examples with the prior's statistics beside them, as torch datasets and padded batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prift.examples import Examples


class PriorDataset(torch.utils.data.Dataset):
    """One item per example: input_ids and labels (int64 [T]), and each statistic at label tokens.

    examples  the examples
    prior     statistics by name, flat over all label tokens of all examples in order; may be empty
    """

    def __init__(self, examples: Examples, prior: Mapping[str, np.ndarray]):
        self.examples, self.prior = examples, dict(prior)
        self._ends = np.cumsum([examples[i].label_mask.sum() for i in range(len(examples))])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        end = self._ends[index]
        labels = np.where(example.label_mask, example.input_ids, -100)
        own = slice(end - int(example.label_mask.sum()), end)
        return {
            "input_ids": example.input_ids.astype(np.int64),
            "labels": labels.astype(np.int64),
            "prior": {name: values[own] for name, values in self.prior.items()},
        }


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pads on the right. int64 [B, T]: input_ids, attention_mask, position_ids, labels; 'prior':
    each statistic [B, T] at its token's place, zero elsewhere."""
    shape = len(items), max(len(item["input_ids"]) for item in items)
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, -100, np.int64)
    prior = {name: np.zeros(shape, v.dtype) for name, v in items[0]["prior"].items()}
    for b, item in enumerate(items):
        size = len(item["input_ids"])
        ids[b, :size], mask[b, :size] = item["input_ids"], 1
        labels[b, :size] = item["labels"]
        places = np.flatnonzero(item["labels"] != -100)
        for name, values in item["prior"].items():
            prior[name][b, places] = values
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    batch: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
    tensors["prior"] = {name: torch.from_numpy(array) for name, array in prior.items()}
    return tensors
