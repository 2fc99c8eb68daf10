"""Writes a small cache as the prift of today does: python -m tests.compat.make tests/compat/v2

Run it once when what is written changes, into a folder of a new name; what is there stays. Tests
read every folder: a cache that was written once is read for good.
"""

import json
import sys
from pathlib import Path

import numpy as np

from prift.cache import sequence_key
from prift.identity import PriorIdentity
from prift.stats import CORE, EXTENDED
from prift.store.versions import STATS_VERSION
from prift.store.writer import CacheWriter
from tests.references import token_stats

_VOCABULARY = 40
_PARTS = [  # sequences, statistics, half precision
    ([1, 2, 3], CORE, False),
    ([4, 5], CORE + EXTENDED, False),
    ([6, 1], CORE, True),
]


def main(folder: Path) -> None:
    identity = PriorIdentity(
        weights="1" * 64,
        config="2" * 64,
        adapter=None,
        dtype="bfloat16",
        logits_dtype="float32",
        attention="sdpa",
        quantization=None,
        backend="hf",
        stats_version=STATS_VERSION,
    )
    expected = []
    provenance = {"prift": json.dumps({"model": "tiny", "revision": None, "packages": {}})}
    for sequences, names, half in _PARTS:
        with CacheWriter(folder / "cache", identity, provenance, half=half) as writer:
            for seed in sequences:
                rng = np.random.default_rng(seed)
                ids = rng.integers(0, _VOCABULARY, 5 + 3 * seed)
                runs = [1, 3, 4, len(ids)] if seed % 2 else [2, len(ids)]
                positions = [
                    p for b, e in zip(runs[::2], runs[1::2], strict=True) for p in range(b, e)
                ]
                logits = rng.normal(0, 2, (len(positions), _VOCABULARY)).astype(np.float32)
                found = [token_stats(z, ids[p]) for z, p in zip(logits, positions, strict=True)]
                stats = {n: np.array([one[n] for one in found]) for n in names}
                writer.add(sequence_key(ids), len(ids), np.array(runs, np.int32), stats)
                plain = {n: [float(v) for v in values] for n, values in stats.items()}
                row = {"ids": ids.tolist(), "spans": runs, "half": half, "stats": plain}
                expected.append(row)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
