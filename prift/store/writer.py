"""Writes rows into a cache, part by part; needs no lock and never leaves half a part visible.

A part is written on this disk under a hidden name, hashed while written, fsynced and made visible
as <UTC time>-<hash>.parquet: it is complete because it exists. Encodings were measured: floats
byte-stream-split or plain, integers dictionary-coded, no statistics on lists; pyarrow's defaults
take half as much again and write eight times slower.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prift.background import Consumer
from prift.errors import CacheError
from prift.identity import PriorIdentity
from prift.store import spans
from prift.store.newfile import NewFile
from prift.store.parts import COLUMN_TYPES, schema
from prift.store.remote import open_root
from prift.store.roots import Root

_ROW_GROUP_TOKENS = 192 * 1024
_MAX_PART_TOKENS = 1 << 22


class CacheWriter:
    """Adds rows to the cache of one prior; a context manager.

    root, identity  the cache (a path, a URL or a Root) and the prior; its folders and prior.json
                    are made where they are absent
    provenance      what explains the numbers: strings for each part's metadata
    part_seconds    a part becomes visible after this long or four million tokens, so this is
                    how much work a kill may lose
    half            floats are stored in float16 where that does, see parts.schema

    published  names of the parts finished so far; `visible` rows are in them

    On leaving, by an exception too, the rows added so far are kept: each of them is whole. An
    interrupt meanwhile is raised once they are. Raises CacheError where the disk or the store
    refuses.
    """

    def __init__(
        self,
        root: str | Path | Root,
        identity: PriorIdentity,
        provenance: dict[str, str],
        part_seconds: float = 60.0,
        half: bool = False,
    ):
        self._root = root if isinstance(root, Root) else open_root(root)
        self._prior = identity.id
        self._provenance, self._seconds, self._half = provenance, part_seconds, half
        self._part: PartWriter | None = None
        self.published: set[str] = set()
        self.visible = self._rows = 0
        with self._guard():
            self._root.begin(self._prior, identity.json())

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._part is None:
            return
        try:
            with Consumer(lambda _: self.flush(), 1) as last:  # interrupts strike this thread alone
                last.put(None)
        except KeyboardInterrupt:
            self.flush()  # where that thread was not begun
            raise

    def add(self, key: bytes, length: int, spans: np.ndarray, stats: dict[str, Any]) -> None:
        """One sequence of `length` tokens: the spans scored, one array per statistic."""
        if self._part is not None and self._part.names != tuple(stats):
            self.flush()
        with self._guard():
            if self._part is None:
                folder = self._root.parts_folder(self._prior)
                self._part = PartWriter(
                    folder, tuple(stats), self._provenance, self._publish, self._half
                )
            self._part.add(key, length, spans, stats)
            self._rows += 1
        old = time.monotonic() - self._part.started > self._seconds
        if old or self._part.tokens >= _MAX_PART_TOKENS:
            self.flush()

    def _publish(self, file: NewFile, name: str) -> Path:
        path = self._root.publish(self._prior, file, name)
        self.published.add(name)
        return path

    @property
    def pending(self) -> bool:
        """Whether rows were added that are not visible yet."""
        return self._part is not None

    def flush(self) -> None:
        """Finishes the part being written, if there is one."""
        if self._part is not None:
            with self._guard():
                self._part.finish()
                self.visible += self._rows
                self._part, self._rows = None, 0

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turns a refused write into a CacheError, and removes the part that it, or an interrupt
        in the middle of writing, broke."""
        try:
            yield
        except BaseException as error:
            if self._part is not None and self._part.broken:
                self._part.abandon()
                self._part, self._rows = None, 0
            if isinstance(error, OSError):
                where, folder = self._root.where(self._prior), self._root.parts_folder(self._prior)
                beside = "" if str(folder.parent) == where else f" by way of {folder}"
                raise CacheError(
                    f"cannot write to the cache {where}{beside}: {error.strerror or error}. "
                    "Finished parts are kept; once there is room and permission, run the same "
                    "command again."
                ) from error
            raise


class PartWriter:
    """Writes one part. `add` rows, then `finish`; without `finish` nothing becomes visible.

    folder     where it is begun, which exists: the cache's parts/, or that of its copies
    names      statistics of every row
    metadata   provenance: strings for the Parquet key-value metadata
    publish    (file, name) -> path: makes it visible
    half       floats are stored in float16 where that does, see parts.schema

    broken     a write was begun and not ended: nothing but `abandon` is left to do
    """

    def __init__(
        self,
        folder: Path,
        names: tuple[str, ...],
        metadata: dict[str, str],
        publish: Callable[[NewFile, str], Path] = NewFile.publish,
        half: bool = False,
    ):
        self.names, self.broken, self.tokens = names, False, 0
        self.started = time.monotonic()
        self._schema = schema(names, half).with_metadata(metadata)
        self._publish = publish
        self._file = NewFile(folder)
        try:
            self._writer = self._open()
        except BaseException:
            self._file.abandon()
            raise
        self._rows: list[tuple[bytes, int, np.ndarray, dict[str, np.ndarray]]] = []
        self._pending = 0

    def _open(self) -> pq.ParquetWriter:
        return pq.ParquetWriter(
            pa.PythonFile(self._file, mode="w"),
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[f"{n}.list.element" for n in self.names if n in ("rank", "n_tie")],
            column_encoding={
                f"{n}.list.element": "BYTE_STREAM_SPLIT"
                for n in self.names
                if COLUMN_TYPES[n] is np.float32 and n != "log_mass_rank"
            },
            write_statistics=["key", "length"],
            write_page_checksum=True,
        )

    def add(self, key: bytes, length: int, runs: np.ndarray, stats: dict[str, Any]) -> None:
        """One sequence: its key, its tokens, its scored runs, one value per scored position."""
        count = spans.count(runs)
        sizes = {name: len(stats[name]) for name in self.names}
        if not spans.valid(runs, length) or set(sizes.values()) != {count}:
            raise ValueError(f"runs {runs} of {length} tokens do not fit the statistics {sizes}")
        self._rows.append((key.ljust(16, b"\0"), length, runs, stats))  # numpy strips zero bytes
        self._pending += count
        self.tokens += count
        if self._pending >= _ROW_GROUP_TOKENS:
            self._write_row_group()

    def finish(self, stamp: str | None = None) -> Path:
        """Makes the part visible and durable; returns its path. stamp: the time in its name, where
        that is not now."""
        if self._rows:
            self._write_row_group()
        self.broken = True
        self._writer.close()
        stamp = stamp or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self._publish(self._file, f"{stamp}-{self._file.sha256()[:32]}.parquet")
        self.broken = False
        return path

    def abandon(self) -> None:
        """Removes what was written so far."""
        self._file.abandon()
        with contextlib.suppress(pa.ArrowException, OSError):
            self._writer.close()  # or its finalizer would, later, and complain on stderr

    def _write_row_group(self) -> None:
        self.broken = True
        keys, lengths, runs, stats = zip(*self._rows, strict=True)
        counts = [len(s[self.names[0]]) for s in stats]
        columns = [
            pa.array(keys, pa.binary(16)),
            pa.array(lengths, pa.int32()),
            _list_array([len(r) for r in runs], np.concatenate(runs).astype(np.int32)),
        ]
        for name in self.names:
            values = np.concatenate([s[name] for s in stats])
            dtype = self._schema.field(name).type.value_type.to_pandas_dtype()
            columns.append(_list_array(counts, values.astype(dtype, copy=False)))
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._rows, self._pending, self.broken = [], 0, False


def _list_array(counts: list[int], values: np.ndarray) -> pa.Array:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, pa.array(values))
