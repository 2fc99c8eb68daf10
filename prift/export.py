"""Token weights for other trainers: a data set's token ids and labels with a rule's weights beside
them, as plain columns of a Parquet or JSONL file.

    input_ids   list of int32
    labels      list of int32: the token itself, or -100 where it is not trained
    weights     list of float32: the rule's weight, 0 where the token is not trained
    <statistic> on request, list of float32 or int32: NaN (null in JSONL) or 0 where not trained

One row per example, in the order of the data; all lists of a row are equally long, and an entry
describes the token at its place: nothing is shifted.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prift import __version__
from prift.errors import OptionError, PriftError
from prift.identity import PriorIdentity
from prift.progress import progress
from prift.scored import read_scored, refuse_unknown_weights
from prift.store.newfile import NewFile
from prift.store.parts import COLUMN_TYPES
from prift.text.dataspec import DataSpec
from prift.text.examples import Examples
from prift.weigher import Weigher
from prift.weighing import check_weights, weigh

_ROWS = 1000  # of a row group, or written at once
_LOWEST = float(np.finfo(np.float32).min)  # JSON has no infinity


@dataclass(frozen=True)
class ExportOptions:
    """What is written, from what, where. See `prift cache export --help`.

    weigher     a rule whose source is the prior
    statistics  names of statistics that get a column too
    """

    model: str
    cache: str
    spec: DataSpec
    weigher: Weigher
    output: str
    prior: str | None = None
    statistics: tuple[str, ...] = ()
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written. mean_weight and zero_share are over label tokens."""

    prior: str
    output: str
    examples: int
    tokens: int
    label_tokens: int
    mean_weight: float
    zero_share: float


def export(options: ExportOptions, say: Callable[[str], None] = print) -> Exported:
    """Writes the file, which appears whole or not at all; one of that name is replaced.

    Raises OptionError for a rule that a file cannot hold the weights of, MissingPrior for data that
    the cache lacks, DataError, CacheError, ModelError, and PriftError where the disk refuses.
    """
    write, place = _writer_for(options.output), Path(options.output).expanduser()
    names = _needed(options)
    scored = read_scored(options, names, say)
    identity, examples, prior = scored.identity, scored.examples, scored.prior
    roles = examples.label_roles() if options.weigher.by_role else None
    weights = weigh(options.weigher, examples.label_counts, prior, roles=roles)
    check_weights(options.weigher, weights, examples)
    values = {"weights": weights, **{name: prior[name] for name in options.statistics}}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = NewFile(place.parent)
        try:
            with progress("writing", total=len(examples), unit="rows") as advance:
                write(file, _tables(examples, values, advance), _facts(options, identity))
            file.publish(place.name)
        except BaseException:
            file.abandon()
            raise
    except OSError as error:
        raise PriftError(
            f"cannot write {place}: {error.strerror or error}. Nothing was left there; make room, "
            "or choose another --output."
        ) from error
    return Exported(
        prior=identity.id,
        output=str(place),
        examples=len(examples),
        tokens=examples.num_tokens,
        label_tokens=examples.num_labels,
        mean_weight=float(weights.mean(dtype=np.float64)),
        zero_share=float((weights == 0).mean()),
    )


def _needed(options: ExportOptions) -> set[str]:
    """Statistics to read. Raises OptionError for what cannot be exported."""
    weigher, names = options.weigher, options.statistics
    refuse_unknown_weights(weigher, "export", "exported")
    if unknown := [name for name in names if name not in COLUMN_TYPES]:
        raise OptionError(
            f"--column {unknown[0]}: no such statistic. There are: {', '.join(COLUMN_TYPES)}."
        )
    return {"logprob", *weigher.needs, *names}


def _tables(
    examples: Examples, values: Mapping[str, np.ndarray], advance: Callable[[int], None]
) -> Iterator[pa.Table]:
    """All rows, some at a time.

    values  one per label token of all examples in order
    """
    begins = np.cumsum(examples.label_counts) - examples.label_counts
    for first in range(0, len(examples), _ROWS):
        chosen: Sequence[Any] = examples[first : first + _ROWS]
        mask = np.concatenate([e.label_mask for e in chosen])
        ids = np.concatenate([e.input_ids for e in chosen])
        offsets = np.concatenate([[0], np.cumsum([len(e.input_ids) for e in chosen])])
        own = slice(begins[first], begins[first] + int(mask.sum()))
        columns = {"input_ids": ids, "labels": np.where(mask, ids, np.int32(-100))}
        for name, given in values.items():
            nothing = np.nan if given.dtype == np.float32 and name != "weights" else 0
            columns[name] = np.full(len(ids), nothing, given.dtype)
            columns[name][mask] = given[own]
        yield pa.table(
            {
                name: pa.ListArray.from_arrays(offsets.astype(np.int32), pa.array(column))
                for name, column in columns.items()
            }
        )
        advance(len(chosen))


def _facts(options: ExportOptions, identity: PriorIdentity) -> dict[str, str]:
    """Metadata of a Parquet file: which weights these are."""
    facts = {
        "prior": identity.id,
        "rule": options.weigher.name,
        "arguments": [factor.arguments for factor in options.weigher.factors],
        "prift": __version__,
    }
    return {"prift": json.dumps(facts, sort_keys=True)}


def _writer_for(output: str) -> Callable[[NewFile, Iterator[pa.Table], dict[str, str]], None]:
    writers = {".parquet": _write_parquet, ".jsonl": _write_jsonl}
    suffix = Path(output).suffix
    if suffix not in writers:
        raise OptionError(f"--output {output}: wanted a name that ends in .parquet or .jsonl.")
    return writers[suffix]


def _write_parquet(file: NewFile, tables: Iterator[pa.Table], facts: dict[str, str]) -> None:
    first = next(tables)
    schema = first.schema.with_metadata(facts)
    with pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, compression="zstd") as writer:
        writer.write_table(first.cast(schema))
        for table in tables:
            writer.write_table(table.cast(schema))


def _write_jsonl(file: NewFile, tables: Iterator[pa.Table], facts: dict[str, str]) -> None:
    for table in tables:
        lines = [json.dumps(_finite(row), separators=(",", ":")) for row in table.to_pylist()]
        file.write("".join(f"{line}\n" for line in lines).encode())


def _finite(row: dict[str, list]) -> dict[str, list]:
    """What JSON can say: null for NaN, the lowest float32 for minus infinity."""
    return {
        name: values
        if name in ("input_ids", "labels")
        else [None if v != v else max(v, _LOWEST) for v in values]
        for name, values in row.items()
    }
