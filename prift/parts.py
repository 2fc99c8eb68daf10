"""One Parquet part of a cache: its schema, its writing, its reading.

A part is written beside its place under a hidden name, hashed while written, fsynced and renamed
to <UTC time>-<hash>.parquet: it is complete because it exists, and says itself whether it is
intact. Encodings were measured: floats byte-stream-split or plain, integers dictionary-coded, no
statistics on lists; pyarrow's defaults take half as much again and write eight times slower.
"""

import hashlib
import itertools
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prift.errors import CacheError

COLUMN_TYPES = {
    "logprob": np.float32,
    "log_mass_rank": np.float32,
    "rank": np.int32,
    "n_tie": np.int32,
    "entropy": np.float32,
}
_ROW_GROUP_TOKENS = 192 * 1024
_counter = itertools.count()


def schema(names: tuple[str, ...]) -> pa.Schema:
    """Arrow schema of a part that holds the statistics `names`."""
    columns = [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("spans", pa.list_(pa.int32()), nullable=False),
    ]
    for name in names:
        value = pa.from_numpy_dtype(COLUMN_TYPES[name])
        columns.append(pa.field(name, pa.list_(value), nullable=False))
    return pa.schema(columns)


class PartWriter:
    """Writes one part. `add` rows, then `finish`; without `finish` nothing becomes visible.

    folder     the cache's parts/, which exists
    names      statistics of every row
    metadata   provenance: strings for the Parquet key-value metadata
    """

    def __init__(self, folder: Path, names: tuple[str, ...], metadata: dict[str, str]):
        self._folder, self._names = folder, names
        self._temporary = folder / f".{socket.gethostname()}-{os.getpid()}-{next(_counter)}.tmp"
        self._file = _HashingFile(self._temporary)
        self._schema = schema(names).with_metadata(metadata)
        self._writer = pq.ParquetWriter(
            pa.PythonFile(self._file, mode="w"),
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[f"{n}.list.element" for n in names if n in ("rank", "n_tie")],
            column_encoding={
                f"{n}.list.element": "BYTE_STREAM_SPLIT"
                for n in names
                if n in ("logprob", "entropy")
            },
            write_statistics=["key", "length"],
            write_page_checksum=True,
        )
        self._rows: list[tuple[bytes, int, np.ndarray, dict[str, np.ndarray]]] = []
        self._pending = 0
        self.tokens = 0
        self.started = time.monotonic()

    def add(self, key: bytes, length: int, spans: np.ndarray, stats: dict[str, Any]) -> None:
        """One sequence: its key, its tokens, its scored runs, one value per scored position."""
        count = int((spans[1::2] - spans[::2]).sum())
        self._rows.append((key, length, spans, stats))
        self._pending += count
        self.tokens += count
        if self._pending >= _ROW_GROUP_TOKENS:
            self._write_row_group()

    def finish(self) -> Path:
        """Makes the part visible and durable; returns its path."""
        if self._rows:
            self._write_row_group()
        self._writer.close()
        digest = self._file.finish()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self._folder / f"{stamp}-{digest[:32]}.parquet"
        os.replace(self._temporary, path)
        _fsync_folder(self._folder)
        return path

    def abandon(self) -> None:
        """Removes what was written so far."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write_row_group(self) -> None:
        keys, lengths, spans, stats = zip(*self._rows, strict=True)
        counts = [int((s[1::2] - s[::2]).sum()) for s in spans]
        columns = [
            pa.array(keys, pa.binary(16)),
            pa.array(lengths, pa.int32()),
            _list_array([len(s) for s in spans], np.concatenate(spans).astype(np.int32)),
        ]
        for name in self._names:
            values = np.concatenate([s[name] for s in stats])
            columns.append(_list_array(counts, values.astype(COLUMN_TYPES[name], copy=False)))
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._rows, self._pending = [], 0


def read_row_groups(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Row groups of a part, each a dict of numpy arrays.

    'key' is bytes 'S16' [R], 'length' int32 [R]; a list column is a pair (values flat, counts
    int64 [R]). Raises CacheError for a file that is not a part with these columns.
    """
    try:
        with pq.ParquetFile(path) as file:
            found = set(file.schema_arrow.names)
            if not {"key", "length", "spans", *columns} <= found:
                raise CacheError(f"{path}: columns found: {sorted(found)}; wanted: {columns}")
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                yield {name: _to_numpy(name, table[name], path) for name in columns}
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{path} cannot be read as a part of a cache: {error}") from error


def part_columns(path: Path) -> tuple[str, ...]:
    """Statistics that a part holds. Raises CacheError."""
    try:
        with pq.ParquetFile(path) as file:
            return tuple(n for n in file.schema_arrow.names if n in COLUMN_TYPES)
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{path} cannot be read as a part of a cache: {error}") from error


def check_hash(path: Path) -> None:
    """Raises CacheError where the part's bytes are not those its name promises."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest[:32] != path.stem.rpartition("-")[2]:
        raise CacheError(
            f"{path} is damaged: its content does not match the hash in its name. Delete the file "
            "and run the same `prift precompute` command again; only its rows are scored anew."
        )


class _HashingFile:
    """A file that hashes what is written to it, in order."""

    def __init__(self, path: Path):
        self._raw = open(path, "xb")
        self._hash = hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._raw.write(data)

    def flush(self) -> None:
        self._raw.flush()

    def finish(self) -> str:
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self.closed = True
        self._raw.close()


def _list_array(counts: list[int], values: np.ndarray) -> pa.Array:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, pa.array(values))


def _to_numpy(name: str, column: pa.ChunkedArray, path: Path) -> Any:
    if column.null_count:
        raise CacheError(f"{path}: column {name} holds nulls")
    array = column.combine_chunks()
    if name == "key":
        if array.type != pa.binary(16):
            raise CacheError(f"{path}: key is {array.type}; wanted fixed_size_binary[16]")
        start = array.offset * 16
        return np.frombuffer(array.buffers()[1], "S16", len(array), start)
    if name == "length":
        return array.to_numpy()
    if not pa.types.is_list(array.type):
        raise CacheError(f"{path}: column {name} is {array.type}; wanted a list")
    wanted = COLUMN_TYPES.get(name, np.int32)
    values = array.flatten().to_numpy(zero_copy_only=False)
    if values.dtype != wanted and not (values.dtype == np.float16 and wanted == np.float32):
        raise CacheError(f"{path}: column {name} holds {values.dtype}; wanted {wanted.__name__}")
    return values.astype(wanted, copy=False), np.diff(array.offsets.to_numpy()).astype(np.int64)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
