"""Everything that must hold of one part: its name, hash, schema, rows and values."""

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from prift.errors import CacheError
from prift.store import invariants, parts, spans
from prift.store.doubles import Doubles
from prift.store.problems import Problem, Verified
from prift.store.roots import MAX_PART, OpenPart, Part, Root, promises

ALWAYS = ("logprob", "log_mass_rank", "rank", "n_tie")
"""Statistics of every part; where bounds had to do (backends/vllm_bounds.py) it has no entropy."""
_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{32}\.parquet")


class PartCheck:
    """The check of one part; adds to `done`."""

    def __init__(
        self,
        root: Root,
        prior: str,
        part: Part,
        doubles: Doubles,
        vocabulary: int | None,
        done: Verified,
    ):
        self._root, self._prior, self._part = root, prior, part
        self._doubles, self._vocabulary, self._done = doubles, vocabulary, done
        self._where = root.where(prior, part.name)

    def _wrong(self, what: str, **place: Any) -> None:
        mend = (
            f"delete {self._where} and run the same `prift precompute` command again; only its "
            "rows are scored anew"
        )
        self._done.problems.append(Problem(self._prior, self._where, what, mend, **place))

    def run(self) -> None:
        if self._part.size > MAX_PART:
            self._done.parts += 1
            self._wrong(f"it is too large for a part: {self._part.size:,} bytes")
            return
        try:
            data = self._root.content(self._prior, self._part)
        except CacheError:
            if self._part.name not in {p.name for p in self._root.parts(self._prior)}:
                return  # compacted meanwhile
            raise
        self._done.parts += 1
        self._done.bytes += len(data)
        if not _NAME.fullmatch(self._part.name):
            self._wrong("its name is not <UTC time>-<32 hex digits>.parquet")
        if not promises(self._part.name, hashlib.sha256(data).hexdigest()):
            return self._wrong("its content does not match the hash in its name")
        source = OpenPart(io.BytesIO(data), self._part.name, self._where)
        try:
            names, _ = parts.part_columns(source)
            with pq.ParquetFile(source) as file:
                groups, schema = file.num_row_groups, file.schema_arrow
        except CacheError as error:
            return self._wrong(_why(error))
        if lacking := [name for name in ALWAYS if name not in names]:
            self._wrong(f"it lacks the core statistics {', '.join(lacking)}")
        half = {n for n in names if str(schema.field(n).type.value_type) == "halffloat"}
        for number in range(groups):
            try:
                columns = ["key", "length", "spans", *names]
                (group,) = parts.read_row_groups(source, columns, [number], verify=True)
            except CacheError as error:
                self._wrong(_why(error), row_group=number)
                continue
            self._group(number, group, names, half)

    def _group(self, number: int, group: dict[str, Any], names: Sequence[str], half: set) -> None:
        keys, lengths, (flat, counts) = group["key"], group["length"], group["spans"]
        self._done.rows += len(keys)
        rows = np.split(flat, np.cumsum(counts)[:-1])[: len(keys)]
        if not spans.all_valid(flat, counts, lengths):
            pairs = zip(rows, lengths.tolist(), strict=True)
            bad = np.array([not spans.valid(runs, length) for runs, length in pairs], bool)
            first = int(bad.argmax())
            shown = f"{rows[first].tolist()[:8]} in {lengths[first]} tokens"
            what = f"spans are no runs within the sequence: {shown}"
            return self._wrong(what, row_group=number, row=first, count=int(bad.sum()))
        if (lengths < 1).any():
            bad = lengths < 1
            first = int(bad.argmax())
            what = f"length is {lengths[first]}"
            self._wrong(what, row_group=number, row=first, count=int(bad.sum()))
        starts = np.concatenate([[0], np.cumsum(counts // 2)])
        tokens = np.concatenate([[0], np.cumsum(flat[1::2].astype(np.int64) - flat[::2])])
        tokens = np.diff(tokens[starts])
        self._done.tokens += int(tokens.sum())
        values = {}
        for name in names:
            column, sizes = group[name]
            if np.array_equal(sizes, tokens):
                values[name] = column
                continue
            bad = sizes != tokens
            first = int(bad.argmax())
            what = f"{name} has {sizes[first]} values, the spans {tokens[first]} positions"
            place = {"row_group": number, "row": first, "statistic": name}
            self._wrong(what, count=int(bad.sum()), **place)
        ends = np.cumsum(tokens)
        for name, what, where in invariants.broken(values, half, self._vocabulary):
            at = int(where.argmax())
            row = int(np.searchsorted(ends, at, "right"))
            position = int(spans.positions_of(rows[row])[at - (ends[row] - tokens[row])])
            self._wrong(
                f"{name} {what}: {_shown(values, at)}",
                row_group=number,
                row=row,
                position=position,
                statistic=name,
                count=int(where.sum()),
            )
        for row, what, name in self._doubles.check(keys, lengths, rows, values, bool(half)):
            self._wrong(what, row_group=number, row=row, statistic=name)


def _shown(values: dict[str, np.ndarray], at: int) -> str:
    return ", ".join(f"{name} {column[at]:.6g}" for name, column in values.items())


def _why(error: CacheError) -> str:
    """What a message of parts.py says, without the file and the mend."""
    return str(error).partition(": ")[2].partition(". Delete the file")[0] or str(error)
