"""Small caches for tests: one identity, rows with numbers that say whose they are, forged parts."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prift.cache import PriorCache
from prift.identity import PriorIdentity
from prift.store.writer import CacheWriter

CORE = ("logprob", "log_mass_rank", "rank", "n_tie", "entropy")
IDENTITY = PriorIdentity(
    weights="a" * 64,
    config="b" * 64,
    adapter=None,
    dtype="float32",
    logits_dtype="float32",
    attention="sdpa",
    quantization=None,
    backend="hf",
    stats_version=1,
)
OTHER = replace(IDENTITY, weights="c" * 64)


def runs(*edges: int) -> np.ndarray:
    return np.array(edges, np.int32)


def key(text: str) -> bytes:
    return text.encode().ljust(16, b".")


def keys(*texts: str) -> np.ndarray:
    return np.array([key(t) for t in texts], "S16")


def stats(ranks, names=CORE) -> dict[str, np.ndarray]:
    """Statistics that can be told apart: all follow from the rank."""
    rank = np.asarray(ranks, np.int32)
    every = {
        "logprob": -rank.astype(np.float32) / 8,
        "log_mass_rank": -(rank - 1).astype(np.float32) / 4,
        "rank": rank,
        "n_tie": np.ones(len(rank), np.int32),
        "entropy": rank.astype(np.float32) / 2,
    }
    return {name: every[name] for name in names}


def add(root, rows, names=CORE) -> Path:
    """Adds one part of rows (key text, length, runs, ranks); returns its path."""
    before = set(parts(root))
    with CacheWriter(root, IDENTITY, {"prift": "{}"}) as writer:
        for name, length, spans, ranks in rows:
            writer.add(key(name), length, spans, stats(ranks, names))
    (path,) = set(parts(root)) - before
    return path


def parts(root) -> list[Path]:
    return sorted((Path(root) / IDENTITY.id / "parts").glob("*.parquet"))


def files(root) -> list[str]:
    """Names of all files below root, hidden ones too."""
    return sorted(p.name for p in Path(root).rglob("*") if p.is_file())


def renamed(path: Path, stamp: str) -> Path:
    """The part under another time: names are what orders parts."""
    target = path.with_name(f"{stamp}-{path.stem.rpartition('-')[2]}.parquet")
    return path.rename(target)


def read(root, wanted: dict[str, np.ndarray], names=("rank",)) -> dict[str, list]:
    """Reads these rows; every statistic as a list."""
    found = PriorCache(root, IDENTITY).read(keys(*wanted), list(wanted.values()), names)
    return {name: values.tolist() for name, values in found.items()}


def missing(root, wanted: dict[str, np.ndarray], names=("rank",)) -> list[int]:
    return PriorCache(root, IDENTITY).missing(keys(*wanted), list(wanted.values()), names)


def forge(root, table: pa.Table, **options) -> Path:
    """A part that prift did not write, but whose name is the hash of its bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return place(root, buffer.getvalue())


def place(root, data: bytes) -> Path:
    folder = Path(root) / IDENTITY.id / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"20250101T000000Z-{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    path.write_bytes(data)
    return path


def table(**changes) -> pa.Table:
    """A right table of one row 'one': 4 tokens, runs 1..4, ranks 1 2 3; with changed columns."""
    columns = {
        "key": pa.array([key("one")], pa.binary(16)),
        "length": pa.array([4], pa.int32()),
        "spans": pa.array([[1, 4]], pa.list_(pa.int32())),
        "logprob": pa.array([[-1.0, -2.0, -3.0]], pa.list_(pa.float32())),
        "log_mass_rank": pa.array([[0.0, -2.0, -3.0]], pa.list_(pa.float32())),
        "rank": pa.array([[1, 2, 3]], pa.list_(pa.int32())),
        "n_tie": pa.array([[1, 1, 1]], pa.list_(pa.int32())),
        "entropy": pa.array([[0.5, 0.5, 0.5]], pa.list_(pa.float32())),
    }
    columns |= changes
    return pa.table({name: value for name, value in columns.items() if value is not None})
