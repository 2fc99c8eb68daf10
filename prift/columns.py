"""What a prior thought of token ids that other programs hold: as arrays beside them, and as columns
of a datasets.Dataset.

A value stands at the token it describes, as labels do before anything shifts them: entry t belongs
to input_ids[t]. Where nothing is scored floats are NaN and whole numbers 0, which no statistic is.
"""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from prift import spans
from prift.cache import PriorCache, sequence_key
from prift.choice import model_name, open_prior
from prift.errors import DataError, MissingPrior, OptionError
from prift.parts import COLUMN_TYPES

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 1000  # of a dataset, handled at once
_IGNORED = -100  # a label that is none


def look_up(
    cache: PriorCache,
    input_ids: Sequence[Sequence[int] | np.ndarray],
    scored: Sequence[Sequence[bool] | np.ndarray] | None = None,
    names: Sequence[str] = ("logprob",),
    missing: Literal["error", "nan"] = "error",
) -> dict[str, list[np.ndarray]]:
    """Statistics of token sequences: by name, one array [T] for each sequence [T].

    scored   bool [T] for each: the tokens asked for; None: all but the first, which has no
             statistics and is never asked for
    missing  'nan': sequences that the cache lacks get NaN and 0 throughout

    Raises MissingPrior saying how many sequences the cache lacks and what would add them,
    OptionError for a name that is no statistic.
    """
    sizes = np.array([len(ids) for ids in input_ids], np.int64)
    flat = np.concatenate([np.zeros(0, np.int64), *(np.asarray(ids) for ids in input_ids)])
    if scored is None:
        mask = np.ones(len(flat), bool)
    else:
        mask = np.concatenate([np.zeros(0, bool), *(np.asarray(m, bool) for m in scored)])
        if [len(m) for m in scored] != sizes.tolist():
            raise DataError("scored should have one entry for each token of each sequence")
    rows = _Rows(flat, mask, sizes, sizes)
    _check_names(names)
    absent = rows.missing(cache, names)
    if len(absent) and missing == "error":
        raise _missing(cache, len(absent), len(sizes), f"sequence {absent[0]}, counted from 0")
    values = rows.read(cache, names, absent)
    ends = np.cumsum(sizes)
    pieces = list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))
    return {name: [array[a:b] for a, b in pieces] for name, array in values.items()}


def attach(
    dataset: "Dataset",
    cache: PriorCache | str | Path,
    names: Sequence[str] = ("logprob",),
    *,
    prior: str | None = None,
    labels: str | None = "labels",
    mask: str | None = None,
    prefix: str = "prior_",
    missing: Literal["error", "nan"] = "error",
) -> "Dataset":
    """The dataset with a column `prefix + name` for each statistic: a list beside `input_ids`.

    dataset  one row per sequence, with `input_ids`. `attention_mask` may end in zeros: padding
    cache    opened (`open_prior`), or a path or URL of which `prior` says which is read
    labels   column of labels: the tokens whose label is not -100 are asked for. None: all are
    mask     column of 0 and 1 instead of it, as `completion_mask`
    missing  'nan': rows that the cache lacks get NaN and 0 throughout

    The columns go with their rows, however the dataset is shuffled, selected or split afterwards.
    Before packing, since a row of several sequences is one that the prior never saw. Raises
    MissingPrior saying how many rows the cache lacks, DataError for rows that the prior cannot have
    seen (labels that are not their token, holes in the attention mask), OptionError.
    """
    from datasets import Features, List, Value

    _check_names(names)
    reader = _Reader(labels if mask is None else None, mask)
    reader.check(dataset, [prefix + name for name in names])
    if not isinstance(cache, PriorCache):
        cache = open_prior(cache, prior, names)
    plain = dataset.with_format("arrow")
    if missing == "error":
        _refuse_missing(plain, reader, cache, names)

    def added(table: pa.Table) -> pa.Table:
        rows = reader.rows(table)
        values = rows.read(cache, names, rows.missing(cache, names))
        offsets = np.concatenate([[0], np.cumsum(rows.sizes)]).astype(np.int32)
        for name, array in values.items():
            column = pa.ListArray.from_arrays(offsets, pa.array(array))
            table = table.append_column(prefix + name, column)
        return table

    new = {
        prefix + n: List(Value("float32" if COLUMN_TYPES[n] is np.float32 else "int32"))
        for n in names
    }
    result = plain.map(
        added,
        batched=True,
        batch_size=_ROWS,
        features=Features({**dataset.features, **new}),
        new_fingerprint=_fingerprint(dataset, cache, reader, list(new), missing),
        desc="attaching statistics",
    )
    shown = dataset.format
    columns = None if shown["columns"] == dataset.column_names else [*shown["columns"], *new]
    return result.with_format(
        shown["type"],
        columns=columns,
        output_all_columns=shown["output_all_columns"],
        **shown["format_kwargs"],
    )


@dataclass(frozen=True)
class _Rows:
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
class _Reader:
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

    def rows(self, table: pa.Table) -> _Rows:
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
        return _Rows(ids, mask.copy(), sizes, lengths)


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


def _refuse_missing(dataset: Any, reader: _Reader, cache: PriorCache, names: Sequence[str]) -> None:
    count, first, begin = 0, None, 0
    for table in dataset.iter(_ROWS):
        absent = reader.rows(table).missing(cache, names)
        if len(absent) and first is None:
            first = begin + int(absent[0])
        count, begin = count + len(absent), begin + len(table)
    if first is not None:
        raise _missing(cache, count, begin, f"row {first}, counted from 0")


def _missing(cache: PriorCache, count: int, of: int, first: str) -> MissingPrior:
    prior = cache.identity
    words = ["prift", "precompute", "--model", model_name(cache.root, prior.id) or "MODEL"]
    words += ["--data", "rows.jsonl", "--cache", cache.root.name]
    words += ["--dtype", prior.dtype, "--attention", prior.attention]
    if prior.logits_dtype != "float32":
        words += ["--logits-dtype", prior.logits_dtype]
    return MissingPrior(
        f"{count:,} of {of:,} sequences have no prior in {cache.folder} (first: {first}). Write "
        "them to a file with the columns input_ids and labels (-100 where nothing is asked for), "
        f"and run:\n  {shlex.join(words)}"
    )


def _check_names(names: Sequence[str]) -> None:
    unknown = [names] if isinstance(names, str) else [n for n in names if n not in COLUMN_TYPES]
    if unknown:
        raise OptionError(
            f"{unknown[0]!r} is no statistic, or no list of them: {', '.join(COLUMN_TYPES)}."
        )


def _fingerprint(
    dataset: Any, cache: PriorCache, reader: _Reader, new: Sequence[str], missing: str
) -> str:
    """What decides the result, for datasets to find it again: no model, no pickled cache."""
    parts = sorted(cache.parts)
    facts = dataset._fingerprint, cache.identity.id, parts, reader, list(new), missing
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
