"""One part out of several that follow one another: the rows that serve readers, in their order.

The sources are read a row group at a time, once their hashes were found right.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prift.errors import CacheError
from prift.identity import canonical_json
from prift.store import parts
from prift.store.index import Index, PartIndex
from prift.store.roots import Root
from prift.store.writer import PartWriter


@dataclass(frozen=True, slots=True)
class Merge:
    """Parts that follow one another, and the time in the name of the one that replaces them."""

    sources: list[PartIndex]
    time: str


def merged(
    root: Root,
    prior: str,
    merge: Merge,
    paths: Sequence[Path],
    advance: Callable[[int], None] = lambda tokens: None,
    wanted: np.ndarray | None = None,
) -> tuple[Path, int]:
    """Publishes one part with the rows of the sources that serve readers; its path on this disk,
    and how many they are. Raises CacheError.

    paths   of the sources
    wanted  'S16': only rows with these keys; None: all
    """
    first = merge.sources[0]
    names = tuple(n for n in parts.COLUMN_TYPES if n in first.names)
    index = Index(merge.sources)
    keys, flat, counts = (
        np.concatenate([getattr(part, field) for part in merge.sources])
        for field in ("keys", "spans", "counts")
    )
    keep = index.find(keys, flat, counts, names) == np.arange(len(keys))
    if wanted is not None:
        keep &= np.isin(keys, wanted)
    for path in paths:
        try:
            parts.check_hash(path)
        except CacheError as error:
            if not root.forget(prior, path.name):
                raise
            raise CacheError(
                f"the copy of {root.where(prior, path.name)} on this disk was damaged, and is "
                "removed. Nothing was deleted; run the same command again."
            ) from error
    facts = {"prift": _facts(paths)}
    writer = None
    try:
        writer = PartWriter(
            root.parts_folder(prior),
            names,
            facts,
            lambda f, n: root.publish(prior, f, n),
            first.half,
        )
        at = 0
        for path in paths:
            for group in parts.read_row_groups(path, ["key", "length", "spans", *names]):
                rows = slice(at, at + len(group["length"]))
                _add(writer, path, group, names, keep[rows], index.tokens[rows])
                advance(int(index.tokens[rows].sum()))
                at = rows.stop
        return writer.finish(merge.time), int(keep.sum())
    except BaseException as error:
        if writer is not None:
            writer.abandon()
        if isinstance(error, OSError):
            raise CacheError(
                f"cannot write to the cache {root.where(prior)}: {error.strerror or error}. "
                "Nothing was deleted; once there is room and permission, run the same command "
                "again."
            ) from error
        raise


def _add(
    writer: PartWriter,
    path: Path,
    group: dict,
    names: Sequence[str],
    keep: np.ndarray,
    tokens: np.ndarray,
) -> None:
    """Adds the rows to keep of a row group; tokens: scored positions of each row."""
    runs, run_counts = group["spans"]
    for name in names:
        if not np.array_equal(group[name][1], tokens):
            raise parts.damaged(path, f"a row's {name} contradict its spans")
    ends, run_ends = np.cumsum(tokens), np.cumsum(run_counts)
    for i in np.flatnonzero(keep).tolist():
        values = slice(ends[i] - tokens[i], ends[i])
        writer.add(
            bytes(group["key"][i]),
            int(group["length"][i]),
            runs[run_ends[i] - run_counts[i] : run_ends[i]],
            {name: group[name][0][values] for name in names},
        )


def stored_schema(path: Path) -> pa.Schema:
    """Of a part. Raises CacheError for a file that is none or is gone."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        if isinstance(error, FileNotFoundError):
            raise CacheError(f"cannot read {path}: it is gone") from error
        raise parts.damaged(path, f"it cannot be read as a part of a cache ({error})") from error


def _facts(paths: Sequence[Path]) -> str:
    """A JSON list of the distinct provenances of these parts, as they come; a text that is no JSON,
    or too deep to be read, as a text."""
    found = {}
    for path in paths:
        text = (stored_schema(path).metadata or {}).get(b"prift")
        if text is None:
            continue
        try:
            fact = json.loads(text)
            ones = [canonical_json(one) for one in (fact if isinstance(fact, list) else [fact])]
        except (ValueError, RecursionError):
            ones = [canonical_json(text.decode(errors="replace"))]
        found.update(dict.fromkeys(ones))
    return f"[{','.join(found)}]"
