"""The cache: what one frozen prior thought of token sequences, shared as a folder of Parquet.

    <root>/<prior id>/prior.json               the identity and nothing else
    <root>/<prior id>/parts/<time>-<hash>.parquet   immutable; complete because it exists

A row is found by its token ids and nothing else: templates, tokenizers, truncation and system
prompts change the ids and so the key; shuffling, packing, label masks and dataset names never do.
Writers need no lock. This module knows no text and no model.
"""

import hashlib
import itertools
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
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CacheError(f"{file} cannot be read: {error}") from error
        found[file.parent.name] = identity = PriorIdentity.parse(text, str(file))
        if identity.id != file.parent.name:
            raise CacheError(f"{file} does not belong there: it describes prior {identity.id}")
    return found


class PriorCache:
    """Statistics of one prior, below `root`. Reading lists the parts once, at `open`.

    cache = PriorCache(root, identity)
    todo = cache.missing(keys, wanted_spans, ("logprob",))
    values = cache.read(keys, wanted_spans, ("logprob",))["logprob"]

    Rows are numbered part after part, row group after row group. The hash of a part is checked
    before its statistics are used for the first time. Raises CacheError for a part that is none.
    """

    def __init__(self, root: str | Path, identity: PriorIdentity):
        self.identity = identity
        self.folder = Path(root).expanduser() / identity.id
        self.parts_folder = self.folder / "parts"
        self._checked: set[Path] = set()
        self._load_index()

    def _load_index(self) -> None:
        """Keys and spans of all rows, and the order of rows by key. Of rows with equal keys the
        first by part name comes first, but any in half precision after all others."""
        paths = sorted(self.parts_folder.glob("[!.]*.parquet"))
        found = [(path, *parts.part_columns(path)) for path in paths]
        found.sort(key=lambda part: part[2])
        self._paths = [path for path, _, _ in found]
        self._columns = [set(names) for _, names, _ in found]
        keys, flat, counts = [np.zeros(0, "S16")], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        self._groups: list[tuple[int, int]] = []  # part and number within it
        group_rows: list[int] = []
        for number, path in enumerate(self._paths):
            columns = ["key", "length", "spans"]
            for at, group in enumerate(parts.read_row_groups(path, columns, verify=True)):
                values, sizes = group["spans"]
                if not spans.all_valid(values, sizes, group["length"]):
                    raise parts.damaged(path, "a row's spans are no runs within its sequence")
                keys.append(group["key"])
                flat.append(values)
                counts.append(sizes)
                self._groups.append((number, at))
                group_rows.append(len(sizes))
        self._spans, self._counts = np.concatenate(flat), np.concatenate(counts)
        self._span_begins = np.cumsum(self._counts) - self._counts
        runs = np.concatenate(
            [[0], np.cumsum(self._spans[1::2].astype(np.int64) - self._spans[::2])]
        )
        begins = self._span_begins // 2
        self._tokens = runs[begins + self._counts // 2] - runs[begins]
        self._group_ends = np.cumsum(group_rows, dtype=np.int64)
        owners = np.array([number for number, _ in self._groups], np.int32)
        self._owner = np.repeat(owners, np.array(group_rows, np.int64))
        self._halves = _halves(np.concatenate(keys))
        self._order = np.argsort(self._halves[:, 0], kind="stable")
        self._sorted = self._halves[self._order, 0]

    def __len__(self) -> int:
        """Rows stored, duplicates included."""
        return len(self._halves)

    def missing(
        self, keys: np.ndarray, wanted: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[int]:
        """Indices of the sequences that no stored row serves, ascending.

        keys    'S16' [N], from `sequence_key`
        wanted  N arrays of spans: the positions asked for
        names   statistics asked for
        """
        return np.flatnonzero(self._find(keys, *spans.flat(wanted), names) < 0).tolist()

    def read(
        self, keys: np.ndarray, wanted: Sequence[np.ndarray], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Each statistic for all wanted positions of all sequences, joined in order.

        Raises MissingPrior where a sequence has no row (use `missing` to say which), CacheError
        where a part does not match the hash in its name or a row contradicts its own spans.
        """
        flat, counts = spans.flat(wanted)
        rows = self._find(keys, flat, counts, names)
        if (rows < 0).any():
            raise MissingPrior(f"{int((rows < 0).sum())} sequences have no row")
        copy = _Copy(self._cover(rows, flat, counts)[1], flat, counts)
        out = {n: np.empty(copy.total, parts.COLUMN_TYPES[n]) for n in names}
        chosen = np.argsort(rows, kind="stable")  # sequences in the order of the rows they need
        group = np.searchsorted(self._group_ends, rows[chosen], "right")
        needed = np.unique(group).tolist()
        for number, own in itertools.groupby(needed, key=lambda g: self._groups[g][0]):
            self._read_part(self._paths[number], list(own), rows, chosen, group, copy, out)
        return out

    def _find(
        self, keys: np.ndarray, flat: np.ndarray, counts: np.ndarray, names: Sequence[str]
    ) -> np.ndarray:
        """The row that serves each sequence, the first in the order of rows; -1 = none."""
        holds = np.array([set(names) <= columns for columns in self._columns], bool)
        halves = _halves(keys)
        at = np.searchsorted(self._sorted, halves[:, 0])
        begins = np.cumsum(counts) - counts
        found = np.full(len(keys), -1, np.int64)
        todo = np.arange(len(keys))
        while True:  # once per row that some key has
            todo = todo[at[todo] < len(self._sorted)]
            todo = todo[self._sorted[at[todo]] == halves[todo, 0]]
            if not len(todo):
                return found
            rows = self._order[at[todo]]
            own = flat[spans.joined(begins[todo], counts[todo])]
            serves = self._cover(rows, own, counts[todo])[0] & holds[self._owner[rows]]
            serves &= self._halves[rows, 1] == halves[todo, 1]
            found[todo[serves]] = rows[serves]
            todo = todo[~serves]
            at[todo] += 1

    def _cover(
        self, rows: np.ndarray, wanted: np.ndarray, wanted_counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`spans.cover` of these rows."""
        counts = self._counts[rows]
        stored = self._spans[spans.joined(self._span_begins[rows], counts)]
        return spans.cover(stored, counts, wanted, wanted_counts)

    def _read_part(
        self,
        path: Path,
        needed: list[int],
        rows: np.ndarray,
        chosen: np.ndarray,
        group: np.ndarray,
        copy: "_Copy",
        out: dict[str, np.ndarray],
    ) -> None:
        """Fills in what these row groups of a part have: chosen = sequences in the order of their
        rows, group = each one's row group."""
        if path not in self._checked:
            parts.check_hash(path)
            self._checked.add(path)
        within = [self._groups[g][1] for g in needed]
        for g, values in zip(needed, parts.read_row_groups(path, list(out), within), strict=True):
            first = self._group_ends[g - 1] if g else 0
            tokens = self._tokens[first : self._group_ends[g]]
            for name, (_, sizes) in values.items():
                if not np.array_equal(sizes, tokens):
                    raise parts.damaged(path, f"a row's {name} contradict its spans")
            begins = np.cumsum(tokens) - tokens
            own = chosen[slice(*np.searchsorted(group, [g, g + 1]))]
            source, target = copy.indices(own, begins[rows[own] - first])
            for name, (flat, _) in values.items():
                out[name][target] = flat[source]


class _Copy:
    """Where each wanted run comes from and goes to.

    offsets       of each wanted run within its row's values
    flat, counts  the wanted runs, row by row
    """

    def __init__(self, offsets: np.ndarray, flat: np.ndarray, counts: np.ndarray):
        self._offsets, self._runs = offsets, counts // 2
        self._first = np.cumsum(self._runs) - self._runs
        self._sizes = flat[1::2].astype(np.int64) - flat[::2]
        ends = np.cumsum(self._sizes)
        self._targets = ends - self._sizes
        self.total = int(ends[-1]) if len(ends) else 0

    def indices(self, sequences: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) of every value of these sequences, whose rows' values begin there."""
        runs = spans.joined(self._first[sequences], self._runs[sequences])
        begins = np.repeat(begins, self._runs[sequences]) + self._offsets[runs]
        sizes = self._sizes[runs]
        return spans.joined(begins, sizes), spans.joined(self._targets[runs], sizes)


def _halves(keys: np.ndarray) -> np.ndarray:
    """uint64 [N, 2] of 'S16' keys: found several times faster than bytes are."""
    return np.ascontiguousarray(keys, "S16").view(np.uint64).reshape(-1, 2)
