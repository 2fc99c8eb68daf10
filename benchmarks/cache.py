"""What a large cache costs: `python -m benchmarks.cache`.

1,000,000 sequences of 200 scored tokens, with statistics as a fair model gives them (two tokens in
three are its first choice), are written, opened, asked for, read whole, and decoded as `prift
train` does. Seconds are of process CPU time, all threads of it, so a rate is one core's.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import apart, machine, table, write
from prift.cache import PriorCache
from prift.identity import PriorIdentity
from prift.mapped import mapped_arrays
from prift.stats import CORE
from prift.store.writer import CacheWriter

IDENTITY = PriorIdentity(
    "benchmark", "benchmark", None, "float32", "float32", "sdpa", None, "hf", 1
)
TOKENS = 200  # of a sequence, behind a prompt of PROMPT
PROMPT = 20
_AT_ONCE = 20_000  # sequences, as many as a part holds

OPEN = """
import time
import numpy as np
from benchmarks.cache import IDENTITY, PriorCache, wanted, keys_of
keys, asked = keys_of({rows}), wanted({rows})
begin = time.process_time()
"""
ASK = """
cache = PriorCache({root!r}, IDENTITY)
opened = time.process_time() - begin
lacking = cache.missing(keys, asked, ("logprob",))
asked_for = time.process_time() - begin
"""


def realistic(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Core statistics [n] as of a fair model: two tokens in three are its first choice."""
    top = rng.random(n) < 0.66
    rank = np.where(top, 1, 2 + rng.pareto(0.8, n).clip(0, 1e5)).astype(np.int32)
    tail = 0.7 * np.log(rank) + rng.gamma(2, 0.8, n)
    mass = rng.gamma(0.7, 1.5, n) + 1e-3
    return {
        "logprob": -np.where(top, rng.gamma(0.5, 0.6, n), tail).astype(np.float32),
        "log_mass_rank": -np.where(top, 0, mass).astype(np.float32),
        "rank": rank,
        "n_tie": np.where(rng.random(n) < 1e-3, 2, 1).astype(np.int32),
        "entropy": rng.gamma(0.6, 2.0, n).astype(np.float32),
    }


def keys_of(rows: int) -> np.ndarray:
    """'S16' [rows]: random keys, the same ones each time."""
    return np.frombuffer(np.random.default_rng(0).bytes(16 * rows), "S16")


def wanted(rows: int) -> list[np.ndarray]:
    """The scored positions of each sequence."""
    return [np.array([PROMPT, PROMPT + TOKENS], np.int32)] * rows


def written(root: str, rows: int, half: bool) -> dict[str, float]:
    """Writes the cache: tokens a second, bytes a token."""
    stats = realistic(_AT_ONCE * TOKENS, np.random.default_rng(1))
    each = [
        {n: v[i * TOKENS : (i + 1) * TOKENS] for n, v in stats.items()} for i in range(_AT_ONCE)
    ]
    keys, runs, length = keys_of(rows), wanted(1)[0], PROMPT + TOKENS
    begin = time.process_time()
    with CacheWriter(root, IDENTITY, {}, part_seconds=1e9, half=half) as writer:
        for number, key in enumerate(keys):
            writer.add(key, length, runs, each[number % _AT_ONCE])
    seconds = time.process_time() - begin
    parts = list(Path(root).glob("*/parts/*.parquet"))
    size = sum(part.stat().st_size for part in parts)
    return {"parts": len(parts), "written": rows * TOKENS / seconds, "bytes": size / rows / TOKENS}


def opened(root: str, rows: int) -> dict[str, float]:
    """Opens the cache and asks for every key in a process of its own: seconds and MiB."""
    values = {"root": root, "rows": rows}
    mib, (first, both, lacking) = apart(
        OPEN.format(**values), ASK.format(**values), "[opened, asked_for, len(lacking)]"
    )
    assert lacking == 0
    return {"open": first, "open_and_ask": both, "open_mib": mib}


def read(root: str, rows: int) -> dict[str, float]:
    """Reads all core statistics, in blocks of sequences, hashes checked: tokens a second."""
    cache, keys = PriorCache(root, IDENTITY), keys_of(rows)
    asked, step = wanted(5 * _AT_ONCE), 5 * _AT_ONCE
    begin = time.process_time()
    for first in range(0, rows, step):
        own = keys[first : first + step]
        cache.read(own, asked[: len(own)], CORE)
    return {"read": rows * TOKENS / (time.process_time() - begin)}


def looked_up(root: str, rows: int) -> dict[str, float]:
    """Statistics of one example after the other, in random order, from the files that training
    decodes them to: microseconds."""
    names = ("logprob", "log_mass_rank", "n_tie")
    rows = min(rows, 5 * _AT_ONCE)
    cache = PriorCache(root, IDENTITY)
    held = mapped_arrays("benchmark", lambda: cache.read(keys_of(rows), wanted(rows), names))
    begins = (np.random.default_rng(2).permutation(rows) * TOKENS).tolist()
    try:
        begin = time.process_time()
        for start in begins:
            for name in names:
                np.array(held[name][start : start + TOKENS])
        return {"lookup": (time.process_time() - begin) / rows * 1e6}
    finally:
        held.close()


def measure(rows: int, half: bool) -> dict[str, float]:
    """One cache, float16 floats where `half`."""
    root = tempfile.mkdtemp()
    try:
        found = written(root, rows, half)
        found |= opened(root, rows) | read(root, rows) | looked_up(root, rows)
    finally:
        shutil.rmtree(root)
    return {"storage": "float16" if half else "float32", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(machine())
    found = [measure(options.rows, half) for half in (False, True)]
    table(
        ["storage", "Mtok/s written", "Mtok/s read", "bytes/token", "s to open",
         "s to open and ask", "MiB for both", "us a look-up"],
        [[f["storage"], f"{f['written'] / 1e6:.1f}", f"{f['read'] / 1e6:.1f}", f"{f['bytes']:.2f}",
          f"{f['open']:.2f}", f"{f['open_and_ask']:.2f}", f"{f['open_mib']:,.0f}",
          f"{f['lookup']:.1f}"] for f in found],
    )  # fmt: skip
    write(options.json, {"machine": machine(), "rows": options.rows, "found": found})


if __name__ == "__main__":
    main()
