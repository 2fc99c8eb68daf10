"""Token sequences of other programs, as they lie in a table: which tokens are asked for, and
what a cache has of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prift.cache import PriorCache, sequence_key
from prift.errors import DataError, OptionError
from prift.store import spans

_IGNORED = -100  # a label that is none


@dataclass(frozen=True)
class Sequences:
    """Sequences end to end, as they lie in a table.

    ids      integers, flat; mask: bool, flat, the tokens asked for
    sizes    int64 [R]: entries of each row; lengths: how many of them are tokens, not padding
    """

    ids: np.ndarray
    mask: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        begins = np.cumsum(self.sizes) - self.sizes
        self.mask[begins[self.sizes > 0]] = False  # position 0 follows nothing
        if len(self.ids) and not 0 <= self.ids.min() <= self.ids.max() < 2**31:
            raise DataError("input_ids holds a number that is no token id")

    def _asked(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """(rows that ask for anything, their keys, their spans)."""
        ends = np.cumsum(self.sizes)
        rows, keys, wanted = [], [], []
        for row, (end, size, length) in enumerate(
            zip(ends.tolist(), self.sizes.tolist(), self.lengths.tolist(), strict=True)
        ):
            runs = spans.spans_of(self.mask[end - size : end])
            if len(runs):
                rows.append(row)
                keys.append(sequence_key(self.ids[end - size : end - size + length]))
                wanted.append(runs)
        return np.array(rows, np.int64), np.array(keys, "S16"), wanted

    def missing(self, cache: PriorCache, names: Sequence[str]) -> np.ndarray:
        """int64: the rows that the cache lacks, ascending."""
        rows, keys, wanted = self._asked()
        return rows[cache.missing(keys, wanted, names)]

    def read(
        self, cache: PriorCache, names: Sequence[str], absent: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Each statistic beside the ids, flat; NaN and 0 where it is not asked for, and in the rows
        `absent`."""
        there = np.ones(len(self.sizes), bool)
        there[absent] = False
        rows, keys, wanted = self._asked()
        kept = np.flatnonzero(there[rows])
        found = cache.read(keys[kept], [wanted[i] for i in kept], names)
        place = self.mask & np.repeat(there, self.sizes)
        values = {}
        for name, given in found.items():
            nothing = np.nan if given.dtype == np.float32 else 0
            values[name] = np.full(len(self.ids), nothing, given.dtype)
            values[name][place] = given
        return values


@dataclass(frozen=True)
class Reader:
    """Which columns of a dataset say what is asked for: at most one of the two."""

    labels: str | None
    mask: str | None

    def check(self, dataset: Any, new: Sequence[str]) -> None:
        """Raises OptionError for a dataset that these columns cannot be read from, or added to."""
        from datasets import Dataset

        if not isinstance(dataset, Dataset):
            raise OptionError(
                f"attach takes a datasets.Dataset; found {type(dataset).__name__}. Attach to each "
                "split of a DatasetDict; save a stream first."
            )
        if dataset.format["type"] == "custom":
            raise OptionError("attach cannot read through with_transform: attach before it.")
        columns = dataset.column_names
        for name in ("input_ids", self.labels, self.mask):
            if name is not None and name not in columns:
                raise OptionError(
                    f"the dataset has no column {name!r}, only {columns}. Name the one of labels "
                    "(labels=) or of 0 and 1 (mask=), or ask for all tokens with labels=None."
                )
        if "seq_lengths" in columns:
            raise OptionError(
                "the dataset is packed (column 'seq_lengths'): attach before packing."
            )
        if taken := [name for name in new if name in columns]:
            raise OptionError(
                f"the dataset has a column {taken[0]!r} already: remove it, or give another prefix."
            )

    def rows(self, table: pa.Table) -> Sequences:
        """The sequences of a table. Raises DataError."""
        ids, sizes = _lists(table, "input_ids")
        mask = np.ones(len(ids), bool)
        if self.labels is not None:
            labels, counts = _lists(table, self.labels)
            _same(counts, sizes, self.labels)
            mask = labels != _IGNORED
            if (labels[mask] != ids[mask]).any():
                raise DataError(f"{self.labels} holds a label that is not its token; wanted -100")
        elif self.mask is not None:
            given, counts = _lists(table, self.mask)
            _same(counts, sizes, self.mask)
            mask = given.astype(bool)
        lengths = sizes
        if "attention_mask" in table.column_names:
            seen, counts = _lists(table, "attention_mask")
            _same(counts, sizes, "attention_mask")
            row = np.repeat(np.arange(len(sizes)), sizes)
            lengths = np.bincount(row[seen == 1], minlength=len(sizes))
            places = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            if not np.array_equal(seen == 1, places < lengths[row]):
                raise DataError("attention_mask has holes; the prior sees the ids alone")
            mask = mask & (seen == 1)
        return Sequences(ids, mask.copy(), sizes, lengths)


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values flat, int64 [R] how many are whose) of a column of lists of whole numbers."""
    column = table[name].combine_chunks()
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not (
        pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)
    ):
        raise DataError(f"{name} should hold a list of whole numbers a row; it is of type {kind}")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise DataError(f"{name} holds nulls")
    sizes = np.diff(column.offsets.to_numpy()).astype(np.int64)
    return values.to_numpy(zero_copy_only=False), sizes


def _same(counts: np.ndarray, sizes: np.ndarray, name: str) -> None:
    if not np.array_equal(counts, sizes):
        raise DataError(f"{name} and input_ids of a row should be equally long")
