"""What a prior thought of token ids that other programs hold: as arrays beside them, and as columns
of a datasets.Dataset.

A value stands at the token it describes, as labels do before anything shifts them: entry t belongs
to input_ids[t]. Where nothing is scored floats are NaN and whole numbers 0, which no statistic is.
"""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from prift.cache import PriorCache
from prift.choice import model_name, open_prior, statistics_option
from prift.errors import DataError, MissingPrior, OptionError
from prift.sequences import Reader, Sequences
from prift.store.parts import COLUMN_TYPES

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 1000  # of a dataset, handled at once


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
    rows = Sequences(flat, mask, sizes, sizes)
    _check_names(names)
    absent = rows.missing(cache, names)
    if len(absent) and missing == "error":
        first = f"sequence {absent[0]}, counted from 0"
        raise _missing(cache, names, len(absent), len(sizes), first)
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
    reader = Reader(labels if mask is None else None, mask)
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


def _refuse_missing(dataset: Any, reader: Reader, cache: PriorCache, names: Sequence[str]) -> None:
    count, first, begin = 0, None, 0
    for table in dataset.iter(_ROWS):
        absent = reader.rows(table).missing(cache, names)
        if len(absent) and first is None:
            first = begin + int(absent[0])
        count, begin = count + len(absent), begin + len(table)
    if first is not None:
        raise _missing(cache, names, count, begin, f"row {first}, counted from 0")


def _missing(
    cache: PriorCache, names: Sequence[str], count: int, of: int, first: str
) -> MissingPrior:
    prior = cache.identity
    words = ["prift", "precompute", "--model", model_name(cache.root, prior.id) or "MODEL"]
    words += ["--data", "rows.jsonl", "--cache", cache.root.given]
    words += statistics_option(names)
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
    dataset: Any, cache: PriorCache, reader: Reader, new: Sequence[str], missing: str
) -> str:
    """What decides the result, for datasets to find it again: no model, no pickled cache."""
    parts = sorted(cache.parts)
    facts = dataset._fingerprint, cache.identity.id, parts, reader, list(new), missing
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
