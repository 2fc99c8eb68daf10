"""One Parquet part of a cache: its schema and its reading.

A part's name ends in the hash of its bytes, so that it says itself whether it is intact. Until the
whole file was hashed nothing in it is believed: what pyarrow makes of damage becomes a CacheError.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prift.errors import CacheError
from prift.store.roots import digest_of_file, promises

COLUMN_TYPES = {
    "logprob": np.float32,
    "log_mass_rank": np.float32,
    "rank": np.int32,
    "n_tie": np.int32,
    "entropy": np.float32,
    "collision": np.float32,
    "expected_rank": np.float32,
    "entropy_top20": np.float32,
}
# Not what float16 has no room for, above (expected_rank) or below (collision).
_MAY_BE_HALF = {"logprob", "log_mass_rank", "entropy", "entropy_top20"}
_MAX_ROWS = 1 << 24
"""Of a row group: one that claims more is damaged. Memory is taken for as many before a page is
read; prift writes 192 k tokens and a sequence."""
# What pyarrow raises for a file that is no Parquet, or is damaged, and what it lets through.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError)


def schema(names: tuple[str, ...], half: bool = False) -> pa.Schema:
    """Arrow schema of a part that holds the statistics `names`; half: those that may be in
    float16, which readers widen again."""
    columns = [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("spans", pa.list_(pa.int32()), nullable=False),
    ]
    for name in names:
        value = pa.from_numpy_dtype(COLUMN_TYPES[name])
        value = pa.float16() if half and name in _MAY_BE_HALF else value
        columns.append(pa.field(name, pa.list_(value), nullable=False))
    return pa.schema(columns)


def read_row_groups(
    path: Path, columns: list[str], wanted: Collection[int] | None = None, verify: bool = False
) -> Iterator[dict[str, Any]]:
    """Row groups of a part, each a dict of numpy arrays.

    wanted  numbers of the row groups to read; None: all
    verify  checks the pages' checksums, for reading before the whole file was hashed

    'key' is bytes 'S16' [R], 'length' int32 [R]; a list column is a pair (values flat, counts
    int64 [R]). Raises CacheError for a file that is not a part with these columns.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=verify) as file:
            _check_columns(path, file.schema_arrow, columns)
            _check_sizes(path, file.metadata)
            for group in range(file.num_row_groups) if wanted is None else wanted:
                table = file.read_row_group(group, columns=columns)
                yield {name: _to_numpy(name, table[name], path) for name in columns}
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def part_columns(path: Path) -> tuple[tuple[str, ...], bool]:
    """Statistics that a part holds, and whether any is in half precision. Raises CacheError."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = tuple(n for n in schema.names if n in COLUMN_TYPES)
            _check_columns(path, schema, ["key", "length", "spans", *names])
            _check_sizes(path, file.metadata)
            return names, any(schema.field(n).type.value_type == pa.float16() for n in names)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def check_hash(path: Path) -> None:
    """Raises CacheError where the part's bytes are not those its name promises."""
    try:
        digest = digest_of_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not promises(path.name, digest):
        raise damaged(path, "its content does not match the hash in its name")


def damaged(path: Path | str, why: str) -> CacheError:
    """The error for a part that must not be used, with what to do about it."""
    return CacheError(
        f"{path} is damaged: {why}. Delete the file and run the same `prift precompute` command "
        "again; only its rows are scored anew."
    )


def _unreadable(path: Path, error: Exception) -> CacheError:
    if isinstance(error, OSError) and error.errno:  # the system's word; pyarrow's have no number
        return CacheError(f"cannot read {path}: {os.strerror(error.errno)}")
    return damaged(path, f"it cannot be read as a part of a cache ({error})")


def _check_columns(path: Path, schema: pa.Schema, columns: list[str]) -> None:
    for name in columns:
        where = schema.get_all_field_indices(name)
        if len(where) != 1:
            raise damaged(path, f"it has the columns {schema.names}, not {columns} once each")
        found = schema.field(where[0]).type
        if name == "key":
            fits = found == pa.binary(16)
        elif name == "length":
            fits = found == pa.int32()
        else:
            wanted = pa.from_numpy_dtype(COLUMN_TYPES.get(name, np.int32))
            allowed = (wanted, pa.float16()) if wanted == pa.float32() else (wanted,)
            fits = pa.types.is_list(found) and found.value_type in allowed
        if not fits:
            raise damaged(path, f"its column {name} is of the type {found}")


def _check_sizes(path: Path, metadata: pq.FileMetaData) -> None:
    for number in range(metadata.num_row_groups):
        # Not what it says of its columns: pyarrow ends the process where that is malformed.
        rows = metadata.row_group(number).num_rows
        if not 0 <= rows <= _MAX_ROWS:
            raise damaged(path, f"its row group {number} claims to have {rows:,} rows")


def _to_numpy(name: str, column: pa.ChunkedArray, path: Path) -> Any:
    array = column.combine_chunks()
    values = array.flatten() if pa.types.is_list(array.type) else array
    if array.null_count or values.null_count:
        raise damaged(path, f"its column {name} holds nulls")
    if name == "key":
        start = array.offset * 16
        return np.frombuffer(array.buffers()[1] or b"", "S16", len(array), start)
    if name == "length":
        return array.to_numpy()
    wanted = COLUMN_TYPES.get(name, np.int32)
    counts = np.diff(array.offsets.to_numpy()).astype(np.int64)
    return values.to_numpy().astype(wanted, copy=False), counts
