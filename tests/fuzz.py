"""Reads mutated parts, whose names are the hashes of their bytes, as all of prift's readers do.

    python -m tests.fuzz --files 5000 --folder /tmp/x [--seed 0]

Anything but an answer or a CacheError ends the process with a traceback, as a crash of a library
ends it with a signal; the file at hand is then still in the folder. Prints one line of JSON.
"""

import argparse
import io
import json
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prift.cache import PriorCache, list_priors
from prift.errors import CacheError
from prift.store import parts
from prift.store.index import PartIndex
from prift.store.remote import open_root
from prift.store.verify import verify
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY
from tests.references import token_stats

_ROOM = 3 << 30
"""Bytes that reading a file may take, whatever it claims: a page's header may claim 2 GiB."""


def bases() -> list[bytes]:
    """Right parts of 40 rows in two row groups: with checksums and without, compressed and not, so
    that mutations reach the decoders; as prift encodes them and in other ways."""
    rng, rows = np.random.default_rng(0), 40
    counts = rng.integers(1, 30, rows).tolist()
    logits = rng.normal(0, 3, (sum(counts), 50)).astype(np.float32)
    stats = [token_stats(z, int(rng.integers(50))) for z in logits]
    columns = {
        "key": pa.array([b"%016d" % i for i in range(rows)], pa.binary(16)),
        "length": pa.array([n + 1 for n in counts], pa.int32()),
        "spans": pa.array([[1, n + 1] for n in counts], pa.list_(pa.int32())),
    }
    offsets = np.cumsum([0, *counts]).astype(np.int32)
    for name in CORE:
        values = np.array([one[name] for one in stats], parts.COLUMN_TYPES[name])
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values))
    table = pa.Table.from_arrays(list(columns.values()), schema=parts.schema(CORE))
    split = {"column_encoding": {"logprob.list.element": "BYTE_STREAM_SPLIT"}}
    some = [f"{n}.list.element" for n in ("rank", "n_tie")]
    ways = [
        {"use_dictionary": some, "compression": "zstd", "write_page_checksum": True} | split,
        {"use_dictionary": some, "compression": "none"} | split,
        {"use_dictionary": True, "compression": "none"},
        {"use_dictionary": False, "compression": "none", "data_page_version": "2.0"},
        {"use_dictionary": some, "compression": "none", "data_page_size": 64},
        {"use_dictionary": False, "compression": "snappy"},
    ]
    found = []
    for way in ways:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=20, **way)
        found.append(buffer.getvalue())
    return found


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data`, changed in one of many ways."""
    size = int.from_bytes(data[-8:-4], "little")
    body, footer = bytearray(data[: -8 - size]), bytearray(data[-8 - size : -8])
    way = draw.choice("body footer both cut splice varint varint varint many swap length".split())
    if way in ("body", "both", "many"):
        for _ in range(draw.choice([1, 1, 2, 8]) if way != "many" else 50):
            body[draw.randrange(4, len(body))] ^= 1 << draw.randrange(8)
    if way in ("footer", "both"):
        for _ in range(draw.choice([1, 1, 2, 8])):
            footer[draw.randrange(len(footer))] ^= 1 << draw.randrange(8)
    if way == "cut":
        return data[: draw.randrange(len(data))] + draw.choice([b"", data[-8:]])
    if way == "splice":
        at, n = draw.randrange(4, len(body)), draw.randrange(1, 200)
        other = draw.randrange(4, len(body))
        body[at : at + n] = draw.choice([b"", b"\xff" * n, bytes(n), body[other : other + n]])
    if way == "swap":
        at, n = draw.randrange(len(footer) - 8), draw.randrange(1, 40)
        other = draw.randrange(len(footer) - 8)
        footer[at : at + n] = footer[other : other + n]
    if way == "varint":  # a number of thrift's: of the footer, or of a page's header
        where = draw.choice([footer, footer, body])
        at = draw.randrange(4, len(where))
        value = draw.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, draw.getrandbits(40)])
        end = at
        while end < len(where) - 1 and where[end] & 128:
            end += 1
        where[at : end + 1] = varint(value if draw.random() < 0.3 else 2 * value)
    size = len(footer) if way != "length" else draw.choice([0, 1, 2**31, draw.randrange(2**16)])
    return bytes(body + footer) + size.to_bytes(4, "little") + data[-4:]


def varint(value: int) -> bytes:
    """Thrift's compact form of an unsigned number; of a signed one twice it."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found + bytes([value]))


def readers(root: Path, part: Path) -> Iterator[str]:
    """Reads the part in every way there is; the ways in which it could be read."""

    def index() -> None:
        PartIndex.read(part)

    def groups() -> None:
        for _ in parts.read_row_groups(part, ["key", "length", "spans", *CORE]):
            pass

    def cache() -> None:
        for identity in list_priors(root).values():
            opened = PriorCache(root, identity)
            for one in opened.parts.values():
                ends = np.cumsum(one.counts)
                wanted = [one.spans[e - c : e] for e, c in zip(ends, one.counts, strict=True)]
                found = opened.read(one.keys, wanted, CORE)
                assert {len(values) for values in found.values()} == {one.tokens}

    def whole() -> None:
        found = verify(open_root(root), [IDENTITY.id])
        assert found.parts == 1
        if found.problems:
            raise CacheError(found.problems[0].line())

    for read in (index, groups, cache, whole):
        try:
            read()
            yield read.__name__
        except CacheError as error:
            assert str(part) in str(error) or "no row" in str(error), error
            assert not isinstance(error.__cause__, MemoryError), error


def fuzz(folder: Path, files: int, seed: int) -> dict[str, int]:
    draw, originals = random.Random(seed), bases()
    root = folder / "cache"
    (root / IDENTITY.id).mkdir(parents=True)
    (root / IDENTITY.id / "prior.json").write_text(IDENTITY.json())
    done = {"files": 0, "unchanged": 0, "index": 0, "groups": 0, "cache": 0, "whole": 0}
    for original in originals:  # so that what is refused below is refused for what was changed
        part = fx.place(root, original)
        assert list(readers(root, part)) == ["index", "groups", "cache", "whole"]
        part.unlink()
    bound(resource.RLIMIT_AS, _ROOM)
    while done["files"] < files:
        data = mutated(original := draw.choice(originals), draw)
        done["files"] += 1
        if data == original:
            done["unchanged"] += 1
            continue
        part = fx.place(root, data)
        for name in readers(root, part):
            done[name] += 1
        part.unlink()
    shutil.rmtree(root)
    return done


def bound(limit: int, further: int) -> None:
    """No more memory than there is now and this much."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(limit, (pages * resource.getpagesize() + further,) * 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(json.dumps(fuzz(asked.folder, asked.files, asked.seed)))
