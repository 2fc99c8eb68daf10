"""What lies in a cache: of each prior its rows, without their statistics, and what is said of them.

Reads footers, keys and spans where they lie; a store's parts are not downloaded. What cannot be
read is listed and passed over: `prift cache verify` says more.
"""

import contextlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from prift.errors import CacheError
from prift.identity import PriorIdentity
from prift.store import parts
from prift.store.index import Index, PartIndex
from prift.store.roots import IDENTITY, Part, Root

_READERS = 8  # threads: a store answers slowly, but many at once
_TEXT = 300  # characters of a fact that are shown: facts are what others wrote


@dataclass(frozen=True)
class PartContents:
    """One part without its statistics.

    half   the statistics that it stores in half precision
    facts  its provenance: one, several in a compacted part, none where there is none to be read
    """

    part: Part
    index: PartIndex
    half: tuple[str, ...]
    facts: list[dict[str, Any]]

    @staticmethod
    def read(root: Root, prior: str, part: Part) -> "PartContents":
        """Raises CacheError for a file that is no part."""
        source = root.source(prior, part)
        try:
            index = PartIndex.read(source)
            with pq.ParquetFile(source) as file:
                metadata, schema = file.metadata.metadata or {}, file.schema_arrow
        finally:
            if hasattr(source, "close"):
                source.close()
        half = tuple(
            n
            for n in parts.COLUMN_TYPES
            if n in index.names and str(schema.field(n).type.value_type) == "halffloat"
        )
        return PartContents(part, index, half, _facts(metadata.get(b"prift", b"{}")))


class Contents:
    """All parts of one prior, in the order of the rows of its `index`.

    identity  None where prior.json cannot be read; `trouble` says why, and what parts cannot be
    """

    def __init__(self, root: Root, prior: str):
        self.root, self.prior = root, prior
        self.trouble: list[str] = []
        self.identity: PriorIdentity | None = None
        try:
            where = f"{root.where(prior)}/{IDENTITY}"
            self.identity = PriorIdentity.parse(root.identity(prior), where)
        except CacheError as error:
            self.trouble.append(str(error))

        def read(part: Part) -> PartContents | str:
            try:
                return PartContents.read(root, prior, part)
            except CacheError as error:
                return str(error)

        listed: list[Part] = []
        try:
            listed = root.parts(prior)
        except CacheError as error:
            self.trouble.append(str(error))
        with ThreadPoolExecutor(_READERS) as readers:
            found = list(readers.map(read, listed))
        whole = [one for one in found if isinstance(one, PartContents)]
        if len(whole) < len(found):
            there = {part.name for part in root.parts(prior)}  # others were compacted meanwhile
            pairs = zip(listed, found, strict=True)
            self.trouble += [w for p, w in pairs if isinstance(w, str) and p.name in there]
        self.parts = sorted(whole, key=lambda one: (one.index.half, one.part.name))
        self.index = Index([one.index for one in self.parts])
        self.keys = np.concatenate([np.zeros(0, "S16"), *(one.index.keys for one in self.parts)])

    @cached_property
    def first(self) -> np.ndarray:
        """bool [rows]: no earlier row has the same key."""
        asked = np.zeros(len(self.keys), np.int64)
        found = self.index.find(self.keys, np.zeros(0, np.int32), asked, ())
        return found == np.arange(len(self.keys))

    @cached_property
    def unused(self) -> np.ndarray:
        """bool [rows]: an earlier row with the same key holds all that this one holds, so no
        reader ever takes it."""
        unused, begin = np.zeros(len(self.keys), bool), 0
        again = ~self.first
        for one in self.parts:
            end = begin + len(one.index.keys)
            rows = begin + np.flatnonzero(again[begin:end])
            if len(rows):
                own = np.repeat(again[begin:end], one.index.counts)
                asked = one.index.spans[own], one.index.counts[again[begin:end]]
                found = self.index.find(self.keys[rows], *asked, sorted(one.index.names))
                unused[rows] = found != rows
            begin = end
        return unused

    @property
    def statistics(self) -> list[str]:
        """Names of the statistics that any part holds, in the order of the schema."""
        held = frozenset[str]().union(*(one.index.names for one in self.parts))
        return [name for name in parts.COLUMN_TYPES if name in held]

    @property
    def bytes(self) -> int:
        """Of all parts that can be read."""
        return sum(one.part.size for one in self.parts)

    def models(self) -> list[dict[str, Any]]:
        """The distinct {'model', 'revision'} that provenance names."""
        facts = [fact for one in self.parts for fact in one.facts]
        pairs = [{n: fact.get(n) for n in ("model", "revision")} for fact in facts]
        named = [pair for pair in pairs if pair["model"]]
        return [pair for i, pair in enumerate(named) if pair not in named[:i]]

    def summary(self) -> dict[str, Any]:
        """The prior in one line. sequences are distinct; tokens are the scored positions of rows
        that some reader may take; newest is when the last part was written."""
        identity = self.identity
        return {
            "prior": self.prior,
            "models": self.models(),
            "dtype": identity and identity.dtype,
            "logits_dtype": identity and identity.logits_dtype,
            "backend": identity and identity.backend,
            "sequences": int(self.first.sum()),
            "tokens": int(self.index.tokens[~self.unused].sum()),
            "bytes": self.bytes,
            "parts": len(self.parts),
            "rows": len(self.keys),
            "statistics": self.statistics,
            "newest": time_text(max((one.part.written for one in self.parts), default=None)),
            "trouble": self.trouble,
        }


def choose(root: Root, wanted: Sequence[str], one: bool = False) -> list[str]:
    """Ids of the priors that these ids, or beginnings of them, name; all where none is named.

    Raises CacheError, which lists the priors there are: for a name that fits none or several,
    and, with `one`, where there is not exactly one to choose.
    """
    there = root.priors()
    if not there:
        raise CacheError(
            f"{root.name} holds no prior. `prift precompute --cache` makes one; --cache says where."
        )
    chosen = []
    for name in wanted:
        fitting = [prior for prior in there if prior.startswith(name)]
        if len(fitting) != 1:
            what = f"{len(fitting)} priors whose ids begin with" if fitting else "no prior"
            raise CacheError(f"{root.name} holds {what} {name}. {_listing(root, fitting or there)}")
        chosen += [prior for prior in fitting if prior not in chosen]
    if not wanted and one and len(there) > 1:
        raise CacheError(f"{root.name} holds {len(there)} priors. {_listing(root, there)}")
    return chosen or there


def _listing(root: Root, priors: Sequence[str]) -> str:
    lines = []
    for prior in priors:
        said = ""
        with contextlib.suppress(CacheError):
            one = PriorIdentity.parse(root.identity(prior), prior)
            said = f"  ({one.dtype}, {one.backend}, weights {str(one.weights)[:12]})"
        lines.append(f"  {prior}{said}")
    return "Name one of these:\n" + "\n".join(lines)


def time_text(seconds: float | None) -> str | None:
    """Unix seconds as ISO 8601 in UTC."""
    return seconds and datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _facts(text: bytes) -> list[dict[str, Any]]:
    """Provenance, made safe to be shown: its text can be printed and is not long."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return []
    listed = facts if isinstance(facts, list) else [facts]
    return [_safe(fact) for fact in listed if isinstance(fact, dict) and fact]


def _safe(value: Any, depth: int = 4) -> Any:
    if isinstance(value, dict) and depth:
        return {_safe(k): _safe(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list) and depth:
        return [_safe(v, depth - 1) for v in value]
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    shown = "".join(c if c.isprintable() else "?" for c in str(value)[:_TEXT])
    return shown if len(str(value)) <= _TEXT else f"{shown}..."
