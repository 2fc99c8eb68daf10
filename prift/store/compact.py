"""Many small parts of a cache into few, without a reader noticing.

What a reader gets depends on the order of the rows, and that on the names of the parts. So parts
are merged only with those that follow them, and the new part takes a place among them:

    before   P1 P2 P3 | Q      P: the same statistics, Q: others
    merged   P1 P2 P3 N | Q    N holds the rows of P1, P2, P3 in this order; nothing is read anew
    after    N | Q             whatever P1, P2 or P3 served, N serves, to the bit

Left out of N are rows that never serve anyone: an earlier one of the three has their key and covers
their spans. A compaction deletes only parts whose rows are all in what it published itself, so
whatever is killed, and however many compact at once, there may be duplicates and no loss; the next
compaction finds them.
"""

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prift.cache import PriorCache, list_priors
from prift.errors import CacheError
from prift.identity import PriorIdentity
from prift.progress import progress
from prift.store import parts
from prift.store.index import Index, PartIndex
from prift.store.inventory import choose
from prift.store.merging import Merge, merged, stored_schema
from prift.store.roots import Root

TARGET_TOKENS = 1 << 22
"""Scored positions from which on a part is large enough: as many as the writer puts in one."""

_TIME = re.compile(r"\d{8}T\d{6}Z")
_TIME_WIDTH = 16
_LISTINGS = 5  # of the parts, while others compact them


@dataclass(frozen=True, slots=True)
class Compacted:
    """What was done to one prior.

    parts, bytes  before
    merged        parts that became `made` others
    duplicates    rows of them that served no reader and are not kept
    made_bytes    of the new parts; merged_bytes: of those they replace
    left          merged parts that were not deleted, since others wrote in between: duplicates,
                  which the next compaction finds
    """

    prior: str
    parts: int
    bytes: int
    merged: int
    merged_bytes: int
    made: int
    made_bytes: int
    duplicates: int
    left: int


def compact(
    root: Root,
    priors: Sequence[str] = (),
    grace: float = 300.0,
    target: int = TARGET_TOKENS,
    say: Callable[[str], None] = lambda line: None,
    wait: Callable[[float], None] = time.sleep,
) -> list[Compacted]:
    """Merges the small parts of these priors, or of all.

    priors  ids, or beginnings of them; one that only a newer prift reads is passed over, unless
            it is named
    grace   seconds between the last new part and the deletion of the first old one, in which
            running readers finish
    target  scored positions that a part should have; it may have up to twice as many
    wait    sleeps

    Raises CacheError for a damaged part, and where the disk or the store refuses; then nothing was
    deleted. A KeyboardInterrupt in the wait leaves both.
    """
    found = list_priors(root)
    runs = []
    for prior in choose(root, priors):
        if (why := found[prior].refusal()) and not priors:
            say(f"prior {prior} is left as it is: {why}")
            continue
        runs.append(_Run(root, found[prior], target))
    total = sum(run.tokens for run in runs)
    with progress("compacting", total=total, unit="tok") as advance:
        for run in runs:
            run.publish(advance)
    merged = sum(len(run.doomed) for run in runs)
    if merged and grace:
        say(
            f"{merged} parts are merged; in {grace:,.0f} s, when running readers have finished, "
            "they are deleted. To stop now is safe: the next compaction goes on."
        )
        wait(grace)
    for run in runs:
        run.delete()
    return [run.result() for run in runs]


def plan(cache: PriorCache, target: int) -> list[Merge]:
    """What to merge: see the module. Parts of full size stay as they are."""
    merges = []
    for half in (False, True):  # readers take all of the one before the first of the other
        found = sorted((p for p in cache.parts.values() if p.half == half), key=lambda p: p.name)
        times: dict[str, int] = {}
        for part in found:
            times[part.name[:_TIME_WIDTH]] = times.get(part.name[:_TIME_WIDTH], 0) + 1
        for _, alike in itertools.groupby(found, lambda part: _kind(cache, part)):
            for sources in _bins(list(alike), target):
                own = [part.name[:_TIME_WIDTH] for part in sources]
                # A name with a time that no other part has sorts among the sources, whatever its
                # hash. Where there is none (other statistics in the same second) they stay.
                free = [t for t in own if own.count(t) == times[t]]
                if len(sources) > 1 and free:
                    merges.append(Merge(sources, max(free)))
    return merges


def alone(cache: PriorCache, part: PartIndex) -> Merge | None:
    """A merge of one part, so that the new one certainly takes its place; None where it may not."""
    width = _TIME_WIDTH
    same = [p for p in cache.parts.values() if p.name[:width] == part.name[:width]]
    if sum(p.half == part.half for p in same) > 1 or _kind(cache, part) == part.name:
        return None
    return Merge([part], part.name[:width])


def _kind(cache: PriorCache, part: PartIndex) -> object:
    """Equal for parts whose rows may lie in one part."""
    if not _TIME.fullmatch(part.name[:_TIME_WIDTH]):
        return part.name
    if part.half:
        stored = stored_schema(cache.path(part.name))
        usual = parts.schema(tuple(part.names), half=True)
        if any(
            stored.field(n).type.value_type != usual.field(n).type.value_type for n in part.names
        ):
            return part.name
    return part.names


def _bins(alike: list[PartIndex], target: int) -> Iterator[list[PartIndex]]:
    """Cuts a row of parts where enough tokens are together and the time in the names changes."""
    held, tokens = [], 0
    for part, following in itertools.zip_longest(alike, alike[1:]):
        held.append(part)
        tokens += part.tokens
        last = following is None or following.name[:_TIME_WIDTH] != part.name[:_TIME_WIDTH]
        if tokens >= target and last:
            yield held
            held, tokens = [], 0
    if held:
        yield held


class _Run:
    """The compaction of one prior."""

    def __init__(self, root: Root, identity: PriorIdentity, target: int):
        self._root, self._prior = root, identity.id
        self._sizes = {part.name: part.size for part in root.parts(self._prior)}
        self._cache = PriorCache(root, identity)
        self._merges = self._planned(target)
        self._before = len(self._cache.parts)
        self._made: list[str] = []
        self._duplicates = self._left = self._made_bytes = 0
        self.tokens = sum(part.tokens for merge in self._merges for part in merge.sources)

    def _planned(self, target: int) -> list[Merge]:
        for last in (*[False] * (_LISTINGS - 1), True):
            try:
                return plan(self._cache, target)
            except CacheError:
                if last or self._all_there(self._cache.parts):
                    raise
                self._cache.refresh()  # another compaction has taken away what was listed
        raise AssertionError

    def _all_there(self, names: Iterable[str]) -> bool:
        return {part.name for part in self._root.parts(self._prior)}.issuperset(names)

    @property
    def doomed(self) -> set[str]:
        """Parts that are merged into others. One that came out again, byte for byte, is not."""
        return {p.name for m in self._merges for p in m.sources} - set(self._made)

    def publish(self, advance: Callable[[int], None]) -> None:
        """Makes all new parts visible."""
        for merge in list(self._merges):
            paths = [self._cache.path(part.name) for part in merge.sources]
            try:
                path, kept = merged(self._root, self._prior, merge, paths, advance)
            except CacheError:
                if self._all_there(part.name for part in merge.sources):
                    raise
                self._merges.remove(merge)  # another compaction has put them into a part
                continue
            self._made.append(path.name)
            self._made_bytes += path.stat().st_size
            self._duplicates += sum(len(part.keys) for part in merge.sources) - kept

    def delete(self) -> None:
        """Deletes the old parts, where that changes nothing for a reader who comes now."""
        if not self.doomed:
            return
        self._cache.refresh()
        now = self._cache.parts
        stay = Index([part for name, part in now.items() if name not in self.doomed])
        for merge, made in zip(self._merges, self._made, strict=True):
            own = {part.name for part in merge.sources} | {made}
            foreign = any(
                min(own) < name < max(own) and part.half == merge.sources[0].half
                for name, part in now.items()
                if name not in own
            )
            served = all(
                (stay.find(part.keys, part.spans, part.counts, sorted(part.names)) >= 0).all()
                for part in merge.sources
            )
            if foreign or not served:
                self._left += len(own & set(now) - {made})
                continue
            for name in sorted(own & set(now) - {made}):
                self._remove(name)

    def _remove(self, name: str) -> None:
        try:
            self._root.remove(self._prior, name)
        except OSError as error:
            raise CacheError(
                f"cannot delete {self._root.where(self._prior, name)}: {error.strerror or error}. "
                "Its rows are in a new part too; once there is permission, run the same command "
                "again."
            ) from error

    def result(self) -> Compacted:
        return Compacted(
            prior=self._prior,
            parts=self._before,
            bytes=sum(self._sizes.values()),
            merged=len(self.doomed),
            merged_bytes=sum(self._sizes.get(name, 0) for name in self.doomed),
            made=len(self._made),
            made_bytes=self._made_bytes,
            duplicates=self._duplicates,
            left=self._left,
        )
