"""How what is found in a cache looks: a table, and bars made of text."""

import sys
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click

LS = ("prior", "model", "dtype", "backend", "sequences", "tokens", "size", "statistics", "newest")
_NUMBERS = {"sequences", "tokens", "size"}
_BAR = 40
_CORE = ("logprob", "log_mass_rank", "rank", "n_tie", "entropy")
_TITLES = {"log_mass_rank": "mass rank u"}


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = _NUMBERS
) -> None:
    """Prints it: a rich table on a terminal, aligned text elsewhere. numbers: columns of them."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        drawn = Table(box=box.SIMPLE_HEAD)
        for name in columns:
            drawn.add_column(name, justify="right" if name in numbers else "left")
        for row in rows:
            drawn.add_row(*map(escape, row))
        Console().print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(columns, row, widths, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def ls_rows(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row below `LS` for each summary of prift.store.inventory."""
    return [
        [
            one["prior"],
            models(one["models"]),
            one["dtype"] or "?",
            one["backend"] or "?",
            f"{one['sequences']:,}",
            f"{one['tokens']:,}",
            size(one["bytes"]),
            statistics(one["statistics"]),
            age(one["newest"]),
        ]
        for one in summaries
    ]


def models(found: Sequence[dict[str, Any]]) -> str:
    """Names with the beginning of the revision, if there is one."""
    names = [
        str(one["model"]) + (f"@{str(one['revision'])[:8]}" if one["revision"] else "")
        for one in found
    ]
    return ", ".join(names) or "?"


def statistics(names: Sequence[str]) -> str:
    """'core' and what else there is."""
    if set(_CORE) <= set(names):
        return " + ".join(["core", *(n for n in names if n not in _CORE)])
    return " + ".join(names) or "none"


def size(number: int) -> str:
    """Bytes as people say them."""
    value, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{number} B" if unit == "B" else f"{value:.1f} {unit}"


def many(number: int, what: str) -> str:
    """'1 part', '2 parts'."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def age(time: str | None) -> str:
    """How long ago an ISO time was."""
    if time is None:
        return "never"
    seconds = max((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds(), 0)
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def info_lines(found: dict[str, Any]) -> Iterator[str]:
    """What `prift cache info` prints of prift.store.histograms.describe."""
    yield f"prior {found['prior']}"
    yield from _section("identity", found["identity"] or {"": "cannot be read"})
    for group in found["provenance"]:
        spent = f"{many(group['parts'], 'part')}, {many(group['rows'], 'row')}"
        if group["from"]:
            spent += f", {' to '.join(sorted({group['from'], group['to']}))}"
        yield from _section(f"provenance of {spent}", group["facts"] or {"": "none"})
    yield from _section("rows", _rows(found))
    yield from _section(
        "statistics",
        {
            name: f"{many(one['rows'], 'row')} in {many(one['parts'], 'part')}"
            + (f", {one['half_rows']:,} of them in half precision" if one["half_rows"] else "")
            for name, one in found["columns"].items()
        },
    )
    yield from bars("length", found["lengths"]["bins"], "rows", whole=True)
    if found["histograms"]:
        yield ""
        yield f"of {found['sampled_tokens']:,} tokens:"
    for name, one in found["histograms"].items():
        mean = "" if one["mean"] is None else f", mean {one['mean']:.4g}"
        title = _TITLES.get(name, name) + mean
        yield from bars(title, one["bins"], "tokens", name in ("rank", "n_tie"))


def _rows(found: dict[str, Any]) -> dict[str, str]:
    lengths = found["lengths"]
    facts = {
        "sequences": f"{found['sequences']:,} distinct",
        "rows": f"{found['rows']:,} in {many(found['parts'], 'part')}, {size(found['bytes'])}",
        "unused": f"{many(found['unused_rows'], 'row')} that no reader takes, since earlier ones "
        f"cover them ({many(found['unused_tokens'], 'token')})",
        "tokens": f"{found['tokens']:,} scored",
    }
    if lengths["max"] is not None:
        facts["length"] = (
            f"{lengths['min']:,} to {lengths['max']:,} tokens, median {lengths['median']:,.0f}"
        )
    if found["covered"] is not None:
        facts["coverage"] = (
            f"{found['covered']:.1%} of the positions that can be scored; "
            f"{found['rows_covered']:,} rows whole"
        )
    if found["bytes_per_token"] is not None:
        facts["bytes per token"] = f"{found['bytes_per_token']:.2f}"
    return facts


def _section(title: str, facts: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield title
    width = max(map(len, facts))
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{n} {v}" for n, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        yield f"  {name.ljust(width)}  {'none' if value is None else value}"


def bars(
    title: str, bins: Sequence[dict[str, Any]], unit: str, whole: bool = False
) -> Iterator[str]:
    """One line per bin from the first that holds something to the last. whole: of numbers that
    are, so that the upper edge, which a bin does not hold, can be given as one less."""
    held = [i for i, one in enumerate(bins) if one["count"]]
    if not held:
        return
    yield ""
    yield f"{title} ({unit})"
    shown = bins[held[0] : held[-1] + 1]
    total, most = sum(one["count"] for one in bins), max(one["count"] for one in bins)
    labels = [_label(one, whole) for one in shown]
    for label, one in zip(labels, shown, strict=True):
        drawn = bar(one["count"] / most)
        yield f"  {label.rjust(max(map(len, labels)))}  {drawn} {one['count'] / total:6.1%}"


def _label(one: dict[str, Any], whole: bool) -> str:
    begin, end = one["from"], one["to"]
    if begin is None:
        return f"below {end:g}"
    if end is None:
        return f"{begin:g} and more"
    end -= whole
    return f"{begin:g}" if begin == end else f"{begin:g} to {end:g}"


def bar(share: float) -> str:
    """Blocks of an eighth where the output can hold them."""
    try:
        "█▏".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ("#" * round(share * _BAR)).ljust(_BAR)
    whole, eighths = divmod(round(share * _BAR * 8), 8)
    return ("█" * whole + " ▏▎▍▌▋▊▉"[eighths]).ljust(_BAR + 1)


def verified_lines(found: Any) -> Iterator[str]:
    """What a prift.store.problems.Verified looked at and found, in short."""
    for one in found.deep:
        mean, most = one["mean_difference"], one["largest_difference"]
        off = "without bound" if mean is None else f"by {mean:.2g} on average, {most:.2g} at most"
        yield (
            f"prior {one['prior']}: {many(one['sequences'], 'sequence')} scored again; over "
            f"{many(one['tokens'], 'token')} logprob differs {off}; "
            f"{many(one['moved_ranks'], 'rank')} moved"
        )
    yield (
        f"{many(len(found.problems), 'problem')} in {many(found.priors, 'prior')}, "
        f"{many(found.parts, 'part')}, {many(found.rows, 'row')}, "
        f"{many(found.tokens, 'token')}, {size(found.bytes)}"
    )
