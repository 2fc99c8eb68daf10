"""The cache: what one frozen prior thought of token sequences, shared as a folder of Parquet.

    <root>/<prior id>/prior.json               the identity and nothing else
    <root>/<prior id>/parts/<time>-<hash>.parquet   immutable; complete because it exists

A row is found by its token ids and nothing else: templates, tokenizers, truncation and system
prompts change the ids and so the key; shuffling, packing, label masks and dataset names never do.
Writers need no lock. This module knows no text and no model.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from prift.errors import CacheError, MissingPrior
from prift.identity import PriorIdentity
from prift.store import parts, spans
from prift.store.index import Index, PartIndex
from prift.store.remote import open_root
from prift.store.roots import IDENTITY, Part, Root

_LISTINGS = 5  # of the parts, while others compact them
_AT_ONCE = 8  # downloads


def sequence_key(input_ids: np.ndarray) -> bytes:
    """First 16 bytes of the sha256 of the ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(input_ids, "<i4")).digest()[:16]


def list_priors(
    root: str | Path | Root, trouble: dict[str, CacheError] | None = None
) -> dict[str, PriorIdentity]:
    """Every prior in the cache by its id. An absent root holds none.

    trouble  gets, by the folder's name, the errors of those whose prior.json is none; None: the
             first is raised

    Raises CacheError.
    """
    root = root if isinstance(root, Root) else open_root(root)
    priors = root.priors()

    def read(prior: str) -> PriorIdentity | CacheError:
        file = f"{root.where(prior)}/{IDENTITY}"
        try:
            identity = PriorIdentity.parse(root.identity(prior), file)
            if identity.id != prior:
                why = f"{file} does not belong there: it describes prior {identity.id}"
                raise CacheError(why)
        except CacheError as error:
            return error
        return identity

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = dict(zip(priors, pool.map(read, priors), strict=True))
    wrong = {prior: one for prior, one in found.items() if isinstance(one, CacheError)}
    there = set(root.priors()) if wrong else set()  # others are taken away meanwhile
    for prior, error in wrong.items():
        if prior in there and trouble is None:
            raise error
        if prior in there and trouble is not None:
            trouble[prior] = error
    return {prior: one for prior, one in found.items() if isinstance(one, PriorIdentity)}


class PriorCache:
    """Statistics of one prior, below `root`: a path, a URL or a Root. Parts are listed once, at
    `open`, and again by `refresh`.

    cache = PriorCache(root, identity)
    todo = cache.missing(keys, wanted_spans, ("logprob",))
    values = cache.read(keys, wanted_spans, ("logprob",))["logprob"]

    The hash of a part is checked before its statistics are used for the first time. Raises
    CacheError for a part that is none, and for what `PriorIdentity.refusal` refuses.

    keys_only  for `missing` alone: of a store's parts keys and spans are read where they lie, and
               nothing is copied
    """

    def __init__(self, root: str | Path | Root, identity: PriorIdentity, keys_only: bool = False):
        identity.check()
        self._keys_only = keys_only
        self.root = root if isinstance(root, Root) else open_root(root)
        self.identity = identity
        self.folder = self.root.where(identity.id)
        self._checked: set[str] = set()
        self._paths: dict[str, Path] = {}
        self._parts: dict[str, PartIndex] = {}
        self._index = Index([])
        self.refresh()

    def refresh(self, own: Set[str] = frozenset()) -> None:
        """Lists the parts again: sees what others have written, and what they have compacted.

        own  names of parts whose coming or going alone is no reason to look
        """
        kept: dict[str, tuple[Path, PartIndex]] = {}  # opened in any of the rounds
        for last in (*[False] * (_LISTINGS - 1), True):
            listed = self.root.parts(self.identity.id)
            if {part.name for part in listed} - own == self._parts.keys() - own:
                return
            todo = [part for part in listed if part.name not in kept]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                found = dict(zip(todo, pool.map(self._tried, todo), strict=True))
            wrong = {part: one for part, one in found.items() if isinstance(one, CacheError)}
            kept |= {p.name: one for p, one in found.items() if not isinstance(one, CacheError)}
            if wrong:
                now = self.root.parts(self.identity.id)
                still = [error for part, error in wrong.items() if part in now]
                if still and (last or listed == now):
                    raise still[0]
                if not last:
                    continue  # parts were taken away between the listing and their reading
            there = [kept[part.name] for part in listed if part.name in kept]
            self._paths = {index.name: path for path, index in there}
            self._parts = {index.name: index for _, index in there}
            self._index = Index(list(self._parts.values()))
            return

    def _tried(self, part: Part) -> tuple[Path, PartIndex] | CacheError:
        try:
            return self._opened(part)
        except CacheError as error:
            return error

    def _opened(self, part: Part) -> tuple[Path, PartIndex]:
        """Where the part, or the copy of it, lies, and its rows."""
        if self._keys_only:
            return Path(), self._parts.get(part.name) or self._keys_of(part)
        path = self.root.fetch(self.identity.id, part)
        if part.name in self._parts:
            return path, self._parts[part.name]
        try:
            return path, PartIndex.read(path)
        except CacheError:
            if not self.root.forget(self.identity.id, part.name):
                raise
            return path, PartIndex.read(self.root.fetch(self.identity.id, part))

    def _keys_of(self, part: Part) -> PartIndex:
        source = self.root.source(self.identity.id, part)
        try:
            return PartIndex.read(source)
        finally:
            if not isinstance(source, Path):
                source.close()

    def _forget_gone(self) -> bool:
        """Whether parts, or copies of them, are gone that were there; forgets them."""
        gone = [name for name, path in self._paths.items() if not path.exists()]
        for name in gone:
            del self._paths[name], self._parts[name]
            self._checked.discard(name)
        if gone:
            self._index = Index(list(self._parts.values()))
        return bool(gone)

    @property
    def parts(self) -> Mapping[str, PartIndex]:
        """What each part holds, by its name, as of the last listing."""
        return self._parts

    def path(self, name: str) -> Path:
        """Where a listed part, or the copy of it, lies on this disk."""
        return self._paths[name]

    def __len__(self) -> int:
        """Rows stored, duplicates included."""
        return len(self._index)

    def missing(
        self, keys: np.ndarray, wanted: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[int]:
        """Indices of the sequences that no stored row serves, ascending.

        keys    'S16' [N], from `sequence_key`
        wanted  N arrays of spans: the positions asked for
        names   statistics asked for
        """
        self.identity.check(names)
        return np.flatnonzero(self._index.find(keys, *spans.flat(wanted), names) < 0).tolist()

    def read(
        self, keys: np.ndarray, wanted: Sequence[np.ndarray], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Each statistic for all wanted positions of all sequences, joined in order.

        Raises MissingPrior where a sequence has no row (use `missing` to say which), CacheError
        where a part does not match the hash in its name or a row contradicts its own spans.
        """
        self.identity.check(names)
        flat, counts = spans.flat(wanted)
        for last in (*[False] * (_LISTINGS - 1), True):
            try:
                return self._read(keys, flat, counts, names)
            except CacheError:
                if last or not self._forget_gone():
                    raise
                self.refresh()  # a part is gone: compacted, if its rows are in others now
                if (self._index.find(keys, flat, counts, names) < 0).any():
                    raise
        raise AssertionError

    def _read(
        self, keys: np.ndarray, flat: np.ndarray, counts: np.ndarray, names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        index = self._index
        rows = index.find(keys, flat, counts, names)
        if (rows < 0).any():
            raise MissingPrior(f"{int((rows < 0).sum())} sequences have no row")
        copy = spans.Copy(index.cover(rows, flat, counts)[1], flat, counts)
        out = {n: np.empty(copy.total, parts.COLUMN_TYPES[n]) for n in names}
        chosen = np.argsort(rows, kind="stable")  # sequences in the order of the rows they need
        group = np.searchsorted(index.group_ends, rows[chosen], "right")
        needed = np.unique(group).tolist()
        for number, own in itertools.groupby(needed, key=lambda g: index.groups[g][0]):
            self._read_part(index.names[number], list(own), rows, chosen, group, copy, out)
        return out

    def _read_part(
        self,
        name: str,
        needed: list[int],
        rows: np.ndarray,
        chosen: np.ndarray,
        group: np.ndarray,
        copy: spans.Copy,
        out: dict[str, np.ndarray],
    ) -> None:
        """Fills in what these row groups of a part have: chosen = sequences in the order of their
        rows, group = each one's row group."""
        index, path = self._index, self._paths[name]
        if name not in self._checked:
            try:
                parts.check_hash(path)
            except CacheError:
                self.root.forget(self.identity.id, name)
                raise
            self._checked.add(name)
        within = [index.groups[g][1] for g in needed]
        for g, values in zip(needed, parts.read_row_groups(path, list(out), within), strict=True):
            first = index.group_ends[g - 1] if g else 0
            tokens = index.tokens[first : index.group_ends[g]]
            for statistic, (_, sizes) in values.items():
                if not np.array_equal(sizes, tokens):
                    raise parts.damaged(path, f"a row's {statistic} contradict its spans")
            begins = np.cumsum(tokens) - tokens
            own = chosen[slice(*np.searchsorted(group, [g, g + 1]))]
            source, target = copy.indices(own, begins[rows[own] - first])
            for statistic, (flat, _) in values.items():
                out[statistic][target] = flat[source]
