"""What `prift cache verify` says."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


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


def lines(found: Verified) -> Iterator[str]:
    """The problems for people, each mend once behind those that it mends."""
    mends: dict[str, list[Problem]] = {}
    for problem in found.problems:
        mends.setdefault(problem.mend, []).append(problem)
    for mend, problems in mends.items():
        for problem in problems:
            yield problem.line()
        yield f"  to mend: {mend}"
