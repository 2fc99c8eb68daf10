"""Command 1: examples - cache -> scorer -> cache.

Scores what the cache does not hold yet, so running the same command again continues a run that
was killed, and scores nothing once all is there.

The data come in windows. While one is scored here, a thread reads the next and looks up what the
cache has of it, and another thread writes, so the device waits for neither.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from prift import spans
from prift.backends import BadLogits, Scorer, TooLarge, hf, ray_data
from prift.background import Consumer, Prefetch
from prift.cache import PriorCache
from prift.dataspec import DataSpec
from prift.errors import ModelError, OptionError
from prift.examples import WINDOW_ROWS, Window
from prift.identity import PriorIdentity
from prift.models import load_config, locate, weight_files
from prift.plan import Plan, Planner
from prift.progress import progress
from prift.provenance import provenance
from prift.report import Report
from prift.stats import STATISTICS
from prift.writer import CacheWriter

_AHEAD = 1  # planned windows that wait; one more is being made
_UNWRITTEN = 512  # scored rows that wait for the writer, so that one long write stops nobody


@dataclass(frozen=True)
class PrecomputeOptions:
    """How the prior is run. See `prift precompute --help`.

    window_rows  see examples.load_windows; None: what suits the engine
    """

    dtype: str = "auto"
    logits_dtype: str = "float32"
    attention: str = "auto"
    positions: str = "labels"
    statistics: str = "core"
    batch_tokens: int | None = None
    compiled: bool | None = None
    part_seconds: float = 60.0
    trust_remote_code: bool = False
    engine: str = "local"
    ray_workers: int | None = None
    ray_gpus: int | None = None
    window_rows: int | None = None


@dataclass(frozen=True)
class Precomputed:
    """What a run did. sequences are distinct; `scored` of them were not in the cache before."""

    prior: str
    folder: str
    examples: int
    sequences: int
    scored: int
    scored_tokens: int
    statistics_tokens: int
    seconds: float


def precompute(
    model: str,
    spec: DataSpec,
    cache_root: str,
    options: PrecomputeOptions | None = None,
    say: Callable[[str], None] = print,
) -> Precomputed:
    """Stores the statistics of every example's tokens under the prior `model`.

    Raises DataError, ModelError, CacheError; rows scored before the error are kept.
    """
    options = options or PrecomputeOptions()
    folder = locate(model, trust_remote_code=options.trust_remote_code)
    config = load_config(folder, options.trust_remote_code)
    weight_files(folder)  # refuses a folder without them before the data are read
    rows = options.window_rows or _suited_rows(options)
    tokenizer = spec.tokenizer_of(folder)
    with Prefetch(_AHEAD) as ahead:
        windows, report, known = _begun(spec, tokenizer, config, rows, ahead.check)
        for line in known:
            say(line)
        identity = _identify(folder, config, options)
        cache = PriorCache(cache_root, identity)
        planner = Planner(cache, options.positions, STATISTICS[options.statistics])
        plans = ahead.start(map(planner.plan, windows))
        del windows  # the thread's now
        plans = _lacking(plans, lambda: _totals(report, known, identity, planner, say))
        plan = next(plans, None)
        started = time.monotonic()
        if plan is not None:
            if not plan.last:
                say(f"prior {identity.id}: scored while the rest of the data is read")
            scorer = _load(model, folder, config, identity, options, say)
            how = {"positions": options.positions, "batch_tokens": options.batch_tokens}
            facts = provenance(model, folder, tokenizer, spec, scorer.device_name, how)
            with (
                CacheWriter(cache_root, identity, facts, options.part_seconds) as writer,
                Consumer(lambda row: writer.add(*row), _UNWRITTEN) as rows,
                progress("scoring", total=lambda: planner.scored_tokens, unit="tok") as advance,
            ):
                while plan is not None:
                    _score(scorer, plan, planner.names, rows, advance)
                    plan = next(plans, None)
        return Precomputed(
            prior=identity.id,
            folder=str(cache.folder),
            examples=report.examples,
            sequences=planner.sequences,
            scored=planner.scored,
            scored_tokens=planner.scored_tokens,
            statistics_tokens=planner.statistics_tokens,
            seconds=time.monotonic() - started,
        )


def _identify(folder: Path, config: Any, options: PrecomputeOptions) -> PriorIdentity:
    return hf.identify(
        folder,
        config,
        dtype=options.dtype,
        logits_dtype=options.logits_dtype,
        attention=options.attention,
    )


def _suited_rows(options: PrecomputeOptions) -> int:
    """Rows of a window for the engine. Raises OptionError where that is not there."""
    if options.engine == "ray":
        ray_data.check_installed()
        return ray_data.WINDOW_ROWS
    if options.ray_workers is not None or options.ray_gpus is not None:
        raise OptionError("--ray-workers and --ray-gpus are for --engine ray")
    return WINDOW_ROWS


def _load(
    model: str,
    folder: Path,
    config: Any,
    identity: PriorIdentity,
    options: PrecomputeOptions,
    say: Callable[[str], None],
) -> Scorer:
    how: dict[str, Any] = {
        "batch_tokens": options.batch_tokens,
        "compiled": options.compiled,
        "trust_remote_code": options.trust_remote_code,
        "say": say,
    }
    if options.engine == "ray":
        share = {"workers": options.ray_workers, "gpus": options.ray_gpus}
        return ray_data.load(model, identity, **share, **how)
    return hf.load(folder, config, identity, **how)


def _begun(
    spec: DataSpec, tokenizer: Any, config: Any, rows: int, check: Callable[[], None]
) -> tuple[Iterator[Window], Report, list[str]]:
    """The windows; the report that their reading fills in; and what to say of it already, which
    is nothing where one window is all. The first window is read here: what is wrong with options
    or data shows before anything is hashed or begun."""
    with progress("tokenising", total=None, unit="rows") as shown:

        def advance(amount: int) -> None:
            check()
            shown(amount)

        windows = spec.windows(tokenizer, config, rows, advance)
        first = next(windows)
    report = first.examples.report
    known = [] if first.last else report.format_lines()
    return chain([first], windows), report, known


def _lacking(plans: Iterator[Plan], tell: Callable[[], None]) -> Iterator[Plan]:
    """The plans with something to score. Calls `tell` once all is read, before the last of them."""
    told = False
    for plan in plans:
        if plan.last:
            told = True
            tell()
        if len(plan.todo.keys):
            yield plan
    if not told:
        tell()


def _totals(
    report: Report,
    known: list[str],
    identity: PriorIdentity,
    planner: Planner,
    say: Callable[[str], None],
) -> None:
    for line in report.lines():
        if line not in known:
            say(line)
    found = planner.sequences - planner.scored
    say(
        f"prior {identity.id}: {planner.sequences:,} distinct sequences, "
        f"{found:,} in the cache, {planner.scored:,} to score"
    )


def _score(
    scorer: Scorer,
    plan: Plan,
    names: Sequence[str],
    rows: Consumer[tuple],
    advance: Callable[[int], None],
) -> None:
    """Scores one window's rows and hands each to the writer: CacheWriter.add's arguments."""
    examples, todo = plan.examples, plan.todo
    size = len(todo.keys)
    sequences = _Lazy(size, lambda i: examples[int(todo.index[i])].input_ids)
    positions = _Lazy(size, lambda i: spans.positions_of(todo.spans[i]))
    try:
        for i, stats in scorer.score(sequences, positions, names):
            values = {n: getattr(stats, n).numpy() for n in stats.names()}
            length = len(sequences[i])
            rows.put((bytes(todo.keys[i]), length, todo.spans[i], values))
            advance(length)
    except BadLogits as error:
        raise ModelError(
            f"{examples.where(todo.index[error.index])}: the model's logits for token "
            f"{error.position} are NaN, +inf, or all -inf. Nothing of this example was stored. "
            "Half-precision overflow is the usual cause: try --dtype bfloat16 or float32."
        ) from error
    except TooLarge as error:
        raise ModelError(
            f"{examples.where(todo.index[error.index])}: a sequence of "
            f"{len(sequences[error.index]):,} tokens does not fit into memory even alone. Cut it "
            "with --max-length."
        ) from error


class _Lazy(Sequence):
    """A sequence whose items are made when asked for, so that memory stays flat."""

    def __init__(self, size: int, get: Callable[[int], Any]):
        self._size, self._get = size, get

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._size:
            raise IndexError(i)
        return self._get(i)
