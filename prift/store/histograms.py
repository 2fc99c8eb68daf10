"""What `prift cache info` tells of a prior: its facts, lengths and coverage, and histograms."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from prift.errors import CacheError
from prift.store import parts
from prift.store.inventory import Contents

_NATS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, np.inf)
_RANKS = (1.0, 2.0, 3.0, 6.0, 11.0, 101.0, 1001.0, 10001.0, np.inf)
_SHARES = (*(i / 10 for i in range(10)), 1.0, 1.0)  # exactly 1 apart
EDGES = {
    "logprob": tuple(0.0 - n for n in reversed(_NATS)),
    "log_mass_rank": _SHARES,
    "rank": _RANKS,
    "n_tie": (1.0, 2.0, 3.0, 6.0, 11.0, np.inf),
    "entropy": _NATS,
    "collision": _SHARES,
    "expected_rank": _RANKS,
    "entropy_top20": (0.0, 0.01, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, np.inf),
}
"""Bins of each statistic, ascending: edge <= value < next edge, the last with both. Those of
logprob hold the upper edge instead. log_mass_rank is shown as u itself."""

LENGTHS = (*(1 << n for n in range(17)), np.inf)
"""Bins of lengths in tokens."""


def describe(
    contents: Contents, tokens: int = 4_000_000, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """All that `prift cache info --json` prints.

    tokens   of the rows whose statistics are read; whole row groups, spread over the cache
    advance  told how many of them were read
    """
    index = contents.index
    lengths = _lengths(contents)
    scored = int(index.tokens.sum())
    open_positions = int(np.maximum(lengths - 1, 0).sum())
    identity = contents.identity
    return contents.summary() | {
        "identity": identity and json.loads(identity.json()),
        "provenance": _provenance(contents),
        "columns": _columns(contents),
        "unused_rows": int(contents.unused.sum()),
        "unused_tokens": int(index.tokens[contents.unused].sum()),
        "covered": scored / open_positions if open_positions else None,
        "rows_covered": int((index.tokens == lengths - 1).sum()),
        "lengths": {
            "min": int(lengths.min(initial=1 << 31)) if len(lengths) else None,
            "median": float(np.median(lengths)) if len(lengths) else None,
            "max": int(lengths.max()) if len(lengths) else None,
            "bins": bins(*counted(lengths, LENGTHS)),
        },
        "bytes_per_token": contents.bytes / scored if scored else None,
        **_histograms(contents, tokens, advance),
    }


def _provenance(contents: Contents) -> list[dict[str, Any]]:
    """Distinct facts, dates apart, with the parts that they explain and the rows of those. The
    rows of a compacted part count for each of its facts."""
    groups: dict[str, dict[str, Any]] = {}
    for one in contents.parts:
        for fact in one.facts or [{}]:
            facts = {name: value for name, value in fact.items() if name != "date"}
            new = {"facts": facts, "parts": 0, "rows": 0, "dates": []}
            group = groups.setdefault(json.dumps(facts, sort_keys=True), new)
            group["parts"] += 1
            group["rows"] += len(one.index.keys)
            group["dates"] += [str(fact["date"])] if "date" in fact else []
    for group in groups.values():
        dates = group.pop("dates")
        group["from"], group["to"] = min(dates, default=None), max(dates, default=None)
    return list(groups.values())


def _columns(contents: Contents) -> dict[str, dict[str, int]]:
    """Of each statistic: the parts and rows that hold it, and the rows of them in half."""
    found = {name: Counter(parts=0, rows=0, half_rows=0) for name in contents.statistics}
    for one in contents.parts:
        for name in one.index.names:
            rows = len(one.index.keys)
            half = rows * (name in one.half)
            found[name].update({"parts": 1, "rows": rows, "half_rows": half})
    return {name: dict(counts) for name, counts in found.items()}


def _lengths(contents: Contents) -> np.ndarray:
    """int64 [rows]: tokens of each row's sequence."""
    found = [np.zeros(0, np.int64)]
    for one in contents.parts:
        source = contents.root.source(contents.prior, one.part)
        found += [group["length"] for group in parts.read_row_groups(source, ["length"])]
    return np.concatenate(found).astype(np.int64)


def _histograms(contents: Contents, tokens: int, advance: Callable[[int], None]) -> dict[str, Any]:
    """'sampled_tokens', and by 'histograms' each statistic's bins and mean over them."""
    index = contents.index
    sizes = np.diff(np.concatenate([[0], np.cumsum(index.tokens)])[index.group_ends], prepend=0)
    order = np.random.default_rng(0).permutation(len(sizes))
    behind = np.cumsum(sizes[order]) - sizes[order]
    chosen = sorted(order[behind < tokens].tolist())
    counts = {n: np.zeros(len(EDGES[n]) - 1, np.int64) for n in contents.statistics}
    sums = {n: np.zeros(2) for n in counts}  # of the finite values, and how many
    for group in chosen:
        number, within = index.groups[group]
        one = contents.parts[number]
        names = [n for n in contents.statistics if n in one.index.names]
        try:
            source = contents.root.source(contents.prior, one.part)
            (values,) = parts.read_row_groups(source, names, [within], verify=True)
        except CacheError as error:
            contents.trouble.append(str(error))
            continue
        for name, (flat, _) in values.items():
            shown = np.exp(flat) if name == "log_mass_rank" else flat
            counts[name] += counted(shown, EDGES[name], upper=name == "logprob")[0]
            finite = shown[np.isfinite(shown)]
            sums[name] += finite.sum(dtype=np.float64), len(finite)
        advance(int(sizes[group]))
    return {
        "sampled_tokens": int(sizes[chosen].sum()),
        "histograms": {
            name: {
                "mean": sums[name][0] / sums[name][1] if sums[name][1] else None,
                "bins": bins(counts[name], EDGES[name]),
            }
            for name in counts
        },
    }


def counted(values: np.ndarray, edges: tuple, upper: bool = False) -> tuple[np.ndarray, tuple]:
    """(int64 [bins], edges): how many values each bin holds. NaN and what no bin holds: none."""
    values = values[~np.isnan(values)].astype(np.float64)
    at = np.searchsorted(edges, values, "left" if upper else "right") - 1
    at = np.maximum(at, 0) if upper else at  # -inf lies on the lowest edge
    at[values == edges[-1]] = len(edges) - 2  # the last bin holds both its edges
    inside = (at >= 0) & (at < len(edges) - 1)
    return np.bincount(at[inside], minlength=len(edges) - 1), edges


def bins(counts: np.ndarray, edges: tuple) -> list[dict[str, Any]]:
    """[{'from', 'to', 'count'}]; null for infinity."""
    ends = [float(edge) if np.isfinite(edge) else None for edge in edges]
    triples = zip(ends, ends[1:], counts.tolist(), strict=False)
    return [{"from": a, "to": b, "count": n} for a, b, n in triples]
