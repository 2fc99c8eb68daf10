"""Caches that earlier versions of prift wrote are read by this one, to the bit where they were
float32. See tests/compat/make.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from prift.cache import PriorCache, list_priors, sequence_key
from prift.store.parts import COLUMN_TYPES
from prift.store.remote import open_root
from prift.store.verify import verify

WRITTEN = sorted(p for p in (Path(__file__).parent / "compat").iterdir() if (p / "cache").is_dir())


def test_there_is_what_is_tested():
    assert [p.name for p in WRITTEN][:1] == ["v1"]
    assert sum(f.stat().st_size for p in WRITTEN for f in p.rglob("*") if f.is_file()) < 100_000


@pytest.fixture(params=WRITTEN, ids=lambda path: path.name)
def written(request):
    return request.param


def test_every_value_comes_back(written):
    (identity,) = list_priors(written / "cache").values()
    cache = PriorCache(written / "cache", identity)
    rows = json.loads((written / "expected.json").read_text())
    assert len(cache) == len(rows)
    whole = {tuple(row["ids"]) for row in rows if not row["half"]}
    for row in rows:
        if row["half"] and tuple(row["ids"]) in whole:
            continue  # a row in float32 is preferred
        key = np.array([sequence_key(np.array(row["ids"]))], "S16")
        spans = [np.array(row["spans"], np.int32)]
        assert cache.missing(key, spans, list(row["stats"])) == []
        found = cache.read(key, spans, list(row["stats"]))
        for name, values in row["stats"].items():
            right = np.array(values, COLUMN_TYPES[name])
            if row["half"] and right.dtype == np.float32:
                right = right.astype(np.float16).astype(np.float32)
            assert found[name].tobytes() == right.tobytes(), name


def test_verify_finds_nothing_wrong(written):
    root = open_root(written / "cache")
    found = verify(root, root.priors())
    assert [problem.line() for problem in found.problems] == []
    assert found.parts >= 3
