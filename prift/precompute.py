"""Command 1: examples - cache -> scorer -> cache.

Scores what the cache does not hold yet, so running the same command again continues a run that
was killed, and scores nothing once all is there.

The data come in windows. While one is scored here, a thread reads the next and looks up what the
cache has of it, and another thread writes, so the device waits for neither.
"""

import functools
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from prift.background import Consumer, Prefetch
from prift.cache import PriorCache
from prift.engines import (
    PrecomputeOptions,
    Prior,
    check_options,
    statistics_of,
    suited_rows,
)
from prift.errors import CacheError
from prift.identity import PriorIdentity
from prift.models import load_config, locate, weight_files
from prift.plan import Plan, Planner, lacking
from prift.progress import progress
from prift.provenance import provenance
from prift.scoring import Storing, score_plan
from prift.shards import Shard
from prift.signals import interrupt_in
from prift.store.claims import Claims
from prift.store.newfile import remove_stale
from prift.store.remote import open_root
from prift.store.roots import IDENTITY, Root
from prift.store.writer import CacheWriter
from prift.text.dataspec import DataSpec
from prift.text.examples import Window
from prift.text.report import Report
from prift.turns import Turns

_AHEAD = 1  # planned windows that wait; one more is being made
_UNWRITTEN = 512  # scored rows that wait for the writer, so that one long write stops nobody


@dataclass(frozen=True)
class Precomputed:
    """What a run did. sequences are distinct; `scored` of them were not in the cache before, nor
    scored by others meanwhile.

    shard     'i/n', of which alone these are counts; examples are of the whole data. None: all
    left_out  sequences that the backend could not score exactly, and that stay missing
    """

    prior: str
    folder: str
    examples: int
    sequences: int
    scored: int
    scored_tokens: int
    statistics_tokens: int
    seconds: float
    shard: str | None = None
    left_out: int = 0


def precompute(
    model: str,
    spec: DataSpec,
    cache_root: str,
    options: PrecomputeOptions | None = None,
    say: Callable[[str], None] = print,
) -> Precomputed:
    """Stores the statistics of every example's tokens under the prior `model`.

    Raises OptionError, DataError, ModelError, CacheError; rows scored before the error are kept.
    """
    options = options or PrecomputeOptions()
    check_options(options)
    folder = locate(model, trust_remote_code=options.trust_remote_code)
    config = load_config(folder, options.trust_remote_code)
    weight_files(folder)  # refuses a folder without them before the data are read
    rows = options.window_rows or suited_rows(options)
    tokenizer = spec.tokenizer_of(folder)

    def read(advance: Callable[[int], None]) -> Iterator[Window]:
        owns = options.shard.owns if options.shard else None
        return spec.windows(tokenizer, config, rows, advance, owns)

    def facts() -> dict[str, str]:
        how = {"positions": options.positions, "batch_tokens": options.batch_tokens}
        device = prior.scorer().device_name
        return provenance(model, folder, tokenizer, spec, device, how)

    # Where it is planned anew, what the data are is not said again.
    say_once = functools.lru_cache(maxsize=None)(say)
    names = statistics_of(options)
    with Prior(model, folder, config, options, say, spec.text.max_length) as prior:
        while True:
            try:
                return _run(read, prior, names, cache_root, options, facts, say, say_once)
            except _Fewer as fewer:
                names = fewer.names


class _Fewer(Exception):
    """The scorer, now that it is loaded, gives these statistics only: what lacks is to be planned
    by them, or it would lack in every run."""

    def __init__(self, names: Sequence[str]):
        super().__init__(", ".join(names))
        self.names = names


def _run(
    read: Callable[[Callable[[int], None]], Iterator[Window]],
    prior: Prior,
    names: Sequence[str],
    cache_root: str,
    options: PrecomputeOptions,
    facts: Callable[[], dict[str, str]],
    say: Callable[[str], None],
    say_once: Callable[[str], None],
) -> Precomputed:
    """Raises _Fewer before anything is written."""
    with Prefetch(_AHEAD) as ahead:
        windows, report, known = _begun(read, ahead.check)
        for line in known:
            say_once(line)
        root, identity = open_root(cache_root), prior.identity
        _check_identity(root, identity)
        cache = PriorCache(root, identity, keys_only=True)
        planner = Planner(cache, options.positions, names)
        plans = ahead.start(map(planner.plan, windows))
        del windows  # the thread's now
        shard = options.shard
        plans = lacking(plans, lambda: _totals(report, identity, planner, shard, say_once))
        claims = Claims(cache.root, identity.id, str(shard or "0/1"))
        turns = Turns(cache, claims, planner.names, lambda: read(lambda amount: None), say)
        started = time.monotonic()
        _work(plans, turns, planner, prior, facts, options, say)
        if turns.left_out:
            say(
                f"{turns.left_out:,} of {turns.left_out + turns.scored:,} sequences were not "
                "stored: they have a token about which the most probable ones do not say enough "
                "(--engine-arg max_logprobs=N lists more of those; -1: all)"
            )
        return Precomputed(
            prior=identity.id,
            folder=str(cache.folder),
            examples=report.examples,
            sequences=planner.sequences,
            scored=turns.scored,
            scored_tokens=turns.scored_tokens,
            statistics_tokens=turns.statistics_tokens,
            seconds=time.monotonic() - started,
            shard=str(shard) if shard else None,
            left_out=turns.left_out,
        )


def _work(
    plans: Iterator[Plan],
    turns: Turns,
    planner: Planner,
    prior: Prior,
    facts: Callable[[], dict[str, str]],
    options: PrecomputeOptions,
    say: Callable[[str], None],
) -> None:
    """Scores the plans, and what others leave undone. Where nothing is to be scored, nothing is
    loaded, and nothing written but a prior.json that lacks. On an interrupt it says what is kept.
    Raises _Fewer.
    """
    writer, cache = None, turns.cache
    try:
        with turns.claims:
            plans = turns.take(plans)
            plan = next(plans, None)
            if plan is None:
                if cache.parts:  # without a prior.json nobody would find them
                    CacheWriter(cache.root, cache.identity, {})
                return
            if not plan.last:
                say(f"prior {cache.identity.id}: scored while the rest of the data is read")
            scorer = prior.scorer()
            if set(names := statistics_of(options, scorer)) != set(planner.names):
                raise _Fewer(names)
            half = options.storage == "float16"
            seconds = options.part_seconds
            writer = CacheWriter(cache.root, cache.identity, facts(), seconds, half)
            remove_stale(cache.root.parts_folder(cache.identity.id))
            turns.own = writer.published
            with (
                writer,
                Consumer(Storing(writer, turns.claims).handle, _UNWRITTEN) as rows,
                progress(
                    "scoring", lambda: planner.scored_tokens - turns.left_tokens, "tok"
                ) as advance,
            ):
                while plan is not None:
                    left = score_plan(scorer, plan, planner.names, rows.put, advance)
                    turns.leave(plan, left)
                    rows.put(plan.name)
                    plan = next(plans, None)
    except (KeyboardInterrupt, RuntimeError) as error:
        if interrupt_in(error) is None:
            raise
        if writer is not None:
            writer.flush()  # where it struck between the end of the one block and the other's
        kept = writer.visible if writer is not None else 0
        say(f"stopped: {kept:,} sequences scored by this run are kept in {cache.folder}. The same "
            "command goes on from there.")  # fmt: skip
        raise


def _check_identity(root: Root, identity: PriorIdentity) -> None:
    """Raises CacheError for a prior.json in the prior's folder that is another's or none: no reader
    would find what is stored beside it."""
    if identity.id not in root.priors():
        return
    where = f"{root.where(identity.id)}/{IDENTITY}"
    try:
        if PriorIdentity.parse(root.identity(identity.id, fresh=True), where) == identity:
            return
        why = f"{where} does not describe prior {identity.id}"
    except CacheError as error:
        why = str(error)
    raise CacheError(
        f"{why}. `prift cache verify --cache {shlex.quote(root.given)}` says what mends it."
    )


def _begun(
    read: Callable[[Callable[[int], None]], Iterator[Window]], check: Callable[[], None]
) -> tuple[Iterator[Window], Report, list[str]]:
    """The windows; the report that their reading fills in; and what to say of it already, which
    is nothing where one window is all. The first window is read here: what is wrong with options
    or data shows before anything is hashed or begun."""
    with progress("tokenising", total=None, unit="rows") as shown:

        def advance(amount: int) -> None:
            check()
            shown(amount)

        windows = read(advance)
        first = next(windows)
    report = first.examples.report
    known = [] if first.last else report.format_lines()
    return chain([first], windows), report, known


def _totals(
    report: Report,
    identity: PriorIdentity,
    planner: Planner,
    shard: Shard | None,
    say: Callable[[str], None],
) -> None:
    for line in report.lines():
        say(line)
    found = planner.sequences - planner.scored
    of = f" of share {shard}" if shard else ""
    say(
        f"prior {identity.id}: {planner.sequences:,} distinct sequences{of}, "
        f"{found:,} in the cache, {planner.scored:,} to score"
    )
