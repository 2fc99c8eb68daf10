"""`prift cache verify`: is each byte of a cache what its writer wrote, and can it be true at all?

Every part is read whole from where it lies, not from a copy; what its statistics must be is in
invariants.py. Finds every problem and goes on. Damage and mistakes are found, forged numbers that
could be some model's are not: deepcheck.py asks the model.
"""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from prift import invariants, parts, spans
from prift.doubles import Doubles
from prift.errors import CacheError
from prift.identity import PriorIdentity, canonical_json
from prift.inventory import Contents
from prift.roots import IDENTITY, OpenPart, Part, Root, digest_in

CORE = ("logprob", "log_mass_rank", "rank", "n_tie", "entropy")
_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{32}\.parquet")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    where      file, as messages call it
    what       what is wrong, and what was found
    mend       what to do about it
    row_group  number in the file, row: number in the row group, both from 0; position: of the token
    count      values or rows that have it; the numbers above are the first one's
    """

    prior: str
    where: str
    what: str
    mend: str
    row_group: int | None = None
    row: int | None = None
    position: int | None = None
    statistic: str | None = None
    count: int = 1

    def line(self) -> str:
        """For people."""
        names = ("row_group", "row", "position")
        place = [(n.replace("_", " "), getattr(self, n)) for n in names]
        inside = ", ".join(f"{name} {value}" for name, value in place if value is not None)
        more = f" ({self.count:,} in this row group)" if self.count > 1 else ""
        return f"{self.where}: {inside + ': ' if inside else ''}{self.what}{more}"


@dataclass(slots=True)
class Verified:
    """What was looked at, and what is wrong with it. `deep` is filled by deepcheck."""

    priors: int = 0
    parts: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    deep: list[dict[str, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"sound": not self.problems} | asdict(self)


def verify(
    root: Root,
    priors: Sequence[str],
    vocabulary: Callable[[PriorIdentity | None], int | None] | None = None,
    advance: Callable[[int], None] = lambda _: None,
    whole: bool = True,
) -> Verified:
    """Checks these priors.

    whole       they are all there are: parts that lie outside of them are a problem
    vocabulary  V of a prior, where it is known
    advance     told how many bytes were checked

    Raises CacheError only where the store does not answer.
    """
    done = Verified(priors=len(priors))
    if whole:
        done.problems += [_nameless(root, name) for name in root.nameless()]
    for prior in priors:
        identity = _check_identity(root, prior, done.problems)
        try:
            listed = root.parts(prior)
        except CacheError as error:
            what, mend = str(error), "see there"
            done.problems.append(Problem(prior, root.where(prior), what, mend))
            continue
        size = vocabulary and vocabulary(identity)
        doubles = Doubles(Contents(root, prior), identity)
        for part in listed:
            _PartCheck(root, prior, part, doubles, size, done).run()
            advance(part.size)
    return done


def size_of(root: Root, priors: Sequence[str]) -> int:
    """Bytes that `verify` will check."""
    total = 0
    for prior in priors:
        with contextlib.suppress(CacheError):  # which it reports
            total += sum(part.size for part in root.parts(prior))
    return total


def _nameless(root: Root, name: str) -> Problem:
    what = f"it holds parts and no {IDENTITY}, so that no reader looks at them"
    mend = (
        f"run the `prift precompute` command that made it again, which writes {IDENTITY}, or "
        f"delete {root.where(name)}"
    )
    return Problem(name, root.where(name), what, mend)


def _check_identity(root: Root, prior: str, problems: list[Problem]) -> PriorIdentity | None:
    where = f"{root.where(prior)}/{IDENTITY}"

    def wrong(what: str, mend: str | None = None) -> None:
        mend = mend or (
            f"delete {where} and run the same `prift precompute` command again, which writes it; "
            f"if that begins another prior, nobody knows whose {prior} is: delete its folder"
        )
        problems.append(Problem(prior, where, what, mend))

    try:
        text = root.identity(prior, fresh=True)
        identity = PriorIdentity.parse(text, where)
    except CacheError as error:
        wrong(str(error).removeprefix(f"{where} ").rstrip("."))
        return None
    if canonical_json(json.loads(text)) != text:
        wrong("its JSON is not canonical, so that its hash is not the prior's id")
    elif hashlib.sha256(text.encode()).hexdigest()[:16] != prior:
        wrong(f"it describes prior {identity.id}, not the one whose folder it lies in")
    elif why := identity.refusal():
        wrong(why, "install the prift that wrote it")
    return identity


class _PartCheck:
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
        if hashlib.sha256(data).hexdigest()[:32] != digest_in(self._part.name):
            return self._wrong("its content does not match the hash in its name")
        source = OpenPart(io.BytesIO(data), self._part.name, self._where)
        try:
            names, _ = parts.part_columns(source)
            with pq.ParquetFile(source) as file:
                groups, schema = file.num_row_groups, file.schema_arrow
        except CacheError as error:
            return self._wrong(_why(error))
        if lacking := [name for name in CORE if name not in names]:
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


def lines(found: Verified) -> Iterator[str]:
    """The problems for people, each mend once behind those that it mends."""
    mends: dict[str, list[Problem]] = {}
    for problem in found.problems:
        mends.setdefault(problem.mend, []).append(problem)
    for mend, problems in mends.items():
        for problem in problems:
            yield problem.line()
        yield f"  to mend: {mend}"
