"""The cache: what one frozen prior thought of token sequences, shared as a folder of Parquet.

    <root>/<prior id>/prior.json               the identity and nothing else
    <root>/<prior id>/parts/<time>-<hash>.parquet   immutable; complete because it exists

A row is found by its token ids and nothing else: templates, tokenizers, truncation and system
prompts change the ids and so the key; shuffling, packing, label masks and dataset names never do.
Writers need no lock. This module knows no text and no model.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prift import parts, spans
from prift.errors import CacheError, MissingPrior
from prift.identity import PriorIdentity


def sequence_key(input_ids: np.ndarray) -> bytes:
    """First 16 bytes of the sha256 of the ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(input_ids, "<i4")).digest()[:16]


def list_priors(root: str | Path) -> dict[str, PriorIdentity]:
    """Every prior in the cache by its id. An absent root holds none. Raises CacheError."""
    found = {}
    for file in sorted(Path(root).expanduser().glob("*/prior.json")):
        found[file.parent.name] = identity = PriorIdentity.parse(file.read_text(), str(file))
        if identity.id != file.parent.name:
            raise CacheError(f"{file} does not belong there: it describes prior {identity.id}")
    return found


class PriorCache:
    """Statistics of one prior, below `root`. Reading lists the parts once, at `open`.

    cache = PriorCache(root, identity)
    todo = cache.missing(keys, wanted_spans, ("logprob",))
    values = cache.read(keys, wanted_spans, ("logprob",))["logprob"]
    """

    def __init__(self, root: str | Path, identity: PriorIdentity):
        self.identity = identity
        self.folder = Path(root).expanduser() / identity.id
        self.parts_folder = self.folder / "parts"
        self._checked: set[Path] = set()
        self._load_index()

    def _load_index(self) -> None:
        """Keys, spans and places of all rows, sorted by key; equal keys in the order of parts."""
        self._paths = sorted(self.parts_folder.glob("*.parquet"))
        self._columns = [parts.part_columns(p) for p in self._paths]
        keys, owner, row, flat, counts = [], [], [], [], []
        for number, path in enumerate(self._paths):
            at = 0
            for group in parts.read_row_groups(path, ["key", "length", "spans"]):
                values, lengths = group["spans"]
                keys.append(group["key"])
                owner.append(np.full(len(lengths), number, np.int32))
                row.append(np.arange(at, at + len(lengths), dtype=np.int64))
                flat.append(values)
                counts.append(lengths)
                at += len(lengths)
        self._keys = np.concatenate(keys) if keys else np.zeros(0, "S16")
        self._owner = np.concatenate(owner) if owner else np.zeros(0, np.int32)
        self._row = np.concatenate(row) if row else np.zeros(0, np.int64)
        self._spans = np.concatenate(flat) if flat else np.zeros(0, np.int32)
        counts = np.concatenate(counts) if counts else np.zeros(0, np.int64)
        self._span_ends = np.cumsum(counts)
        self._order = np.argsort(self._keys, kind="stable")
        self._sorted = self._keys[self._order]

    def __len__(self) -> int:
        """Rows stored, duplicates included."""
        return len(self._keys)

    def missing(
        self, keys: np.ndarray, wanted: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[int]:
        """Indices of the sequences that no stored row serves.

        keys    'S16' [N], from `sequence_key`
        wanted  N arrays of spans: the positions asked for
        names   statistics asked for
        """
        places = self._find(keys, wanted, names)
        return [i for i, place in enumerate(places) if place < 0]

    def read(
        self, keys: np.ndarray, wanted: Sequence[np.ndarray], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Each statistic for all wanted positions of all sequences, joined in order.

        Raises MissingPrior where a sequence has no row (use `missing` to say which), CacheError
        where a part does not match the hash in its name or a row contradicts its own spans.
        """
        places = self._find(keys, wanted, names)
        if (places < 0).any():
            raise MissingPrior(f"{int((places < 0).sum())} sequences have no row")
        ends = np.cumsum([spans.count(s) for s in wanted])
        total = int(ends[-1]) if len(ends) else 0
        out = {n: np.empty(total, parts.COLUMN_TYPES[n]) for n in names}
        by_part = np.argsort(self._owner[places] if len(places) else places, kind="stable")
        at = 0
        while at < len(by_part):
            number = self._owner[places[by_part[at]]]
            stop = at
            while stop < len(by_part) and self._owner[places[by_part[stop]]] == number:
                stop += 1
            self._read_part(int(number), by_part[at:stop], places, wanted, ends, out)
            at = stop
        return out

    def _find(
        self, keys: np.ndarray, wanted: Sequence[np.ndarray], names: Sequence[str]
    ) -> np.ndarray:
        """Index of the row that serves each sequence, the first by part name; -1 = none."""
        covers = np.array([set(names) <= set(c) for c in self._columns], bool)
        first = np.searchsorted(self._sorted, keys, "left")
        last = np.searchsorted(self._sorted, keys, "right")
        places = np.full(len(keys), -1, np.int64)
        for i in np.flatnonzero(last > first):
            for place in self._order[first[i] : last[i]]:
                if covers[self._owner[place]] and self._serves(place, wanted[i]):
                    places[i] = place
                    break
        return places

    def _row_spans(self, place: int) -> np.ndarray:
        return self._spans[self._span_ends[place - 1] if place else 0 : self._span_ends[place]]

    def _serves(self, place: int, wanted: np.ndarray) -> bool:
        stored = self._row_spans(place)
        return stored.tobytes() == wanted.tobytes() or spans.find(stored, wanted) is not None

    def _read_part(
        self,
        number: int,
        chosen: np.ndarray,
        places: np.ndarray,
        wanted: Sequence[np.ndarray],
        ends: np.ndarray,
        out: dict[str, np.ndarray],
    ) -> None:
        path = self._paths[number]
        if path not in self._checked:
            parts.check_hash(path)
            self._checked.add(path)
        chosen = chosen[np.argsort(self._row[places[chosen]], kind="stable")]
        rows, at, base = self._row[places[chosen]], 0, 0
        for group in parts.read_row_groups(path, list(out)):
            starts = {n: np.cumsum(group[n][1]) - group[n][1] for n in out}
            size = len(next(iter(starts.values())))
            while at < len(chosen) and rows[at] < base + size:
                i, local = chosen[at], rows[at] - base
                stored = self._row_spans(places[i])
                index = spans.find(stored, wanted[i])
                for name, target in out.items():
                    values, counts = group[name]
                    if counts[local] != spans.count(stored):
                        raise CacheError(f"{path}: a row's {name} contradicts its spans")
                    begin = starts[name][local]
                    row = values[begin : begin + counts[local]]
                    target[ends[i] - len(index) : ends[i]] = row[index]
                at += 1
            base += size
