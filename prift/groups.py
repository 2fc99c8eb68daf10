"""Label tokens in groups: by length of the sequence, by dataset, by file, by whose words they are;
and what of a rule's weights falls to each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from prift.roles import ROLES
from prift.store.histograms import LENGTHS, bins
from prift.text.examples import Examples


class Groups:
    """The groups of these examples, found once for all rules; each example has label tokens.

    data   what the examples were loaded from: one name per --data
    roles  uint8 [num_labels]: codes of prift.roles, of each label token
    """

    def __init__(self, examples: Examples, data: Sequence[str]) -> None:
        self.roles = examples.label_roles()
        self._counts = examples.label_counts
        self._begins = np.cumsum(self._counts) - self._counts
        self._data = list(data)
        self._files, self._file_of = examples.files()
        self._dataset_of = np.array([number for number, _ in self._files])[self._file_of]
        self._length_of = np.searchsorted(LENGTHS, examples.lengths, "right") - 1

    def shares(self, weights: np.ndarray) -> dict[str, list[dict[str, Any]]]:
        """As JSON has them, of each group its label tokens, and what of them weighs. Groups without
        an example are left out; of `datasets` none is, so that there is one per --data, in order.

        weights  float32 [num_labels]
        """
        whole = len(weights), float(weights.sum(dtype=np.float64))
        kept = np.add.reduceat(weights != 0, self._begins, dtype=np.int64)
        sums = np.add.reduceat(weights, self._begins, dtype=np.float64)

        def grouped(names: list[dict], group_of: np.ndarray) -> list[dict[str, Any]]:
            size = len(names)
            columns = (
                np.bincount(group_of, minlength=size),
                *(np.bincount(group_of, each, size) for each in (self._counts, kept, sums)),
            )
            rows = zip(names, *columns, strict=True)
            return [{**name, **_group(*values, *whole)} for name, *values in rows]

        lengths = [
            {"from": one["from"], "to": one["to"]}
            for one in bins(np.zeros(len(LENGTHS) - 1, np.int64), LENGTHS)
        ]
        datasets = [{"dataset": name} for name in self._data]
        files = [{"dataset": self._data[of], "file": name} for of, name in self._files]
        return {
            "lengths": _held(grouped(lengths, self._length_of)),
            "datasets": grouped(datasets, self._dataset_of),
            "files": _held(grouped(files, self._file_of)),
            "roles": self._by_role(weights, whole),
        }

    def _by_role(self, weights: np.ndarray, whole: tuple[int, float]) -> list[dict[str, Any]]:
        found = []
        for code, name in enumerate(ROLES):
            if (own := self.roles == code).any():
                number = int(np.logical_or.reduceat(own, self._begins).sum())
                some = weights[own]
                values = number, len(some), np.count_nonzero(some), some.sum(dtype=np.float64)
                found.append({"role": name, **_group(*values, *whole)})
        return found


def _held(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in groups if one["examples"]]


def _group(
    examples: int, labels: int, kept: int, weight: float, tokens: int, everything: float
) -> dict[str, Any]:
    """A group of label tokens, of examples so many, among all; its own shares None where empty."""
    return {
        "examples": int(examples),
        "label_tokens": int(labels),
        "kept_share": float(kept / labels) if labels else None,
        "mean_weight": float(weight / labels) if labels else None,
        "share_of_tokens": float(labels / tokens),
        "share_of_weight": float(weight / everything) if everything else None,
    }
