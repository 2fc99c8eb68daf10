"""docs/cache.md: its code runs, and it leaves nothing out."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from prift.cache import sequence_key
from prift.identity import PriorIdentity
from prift.writer import CacheWriter
from tests import cache_fixtures as fx
from tests.cache_fixtures import IDENTITY, runs

DOCS = Path(__file__).parent.parent / "docs" / "cache.md"


def test_the_code_in_the_docs_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with CacheWriter("cache", IDENTITY, {}) as writer:
        ids = np.array([11, 42, 7, 99], np.int32)
        writer.add(sequence_key(ids), 4, runs(1, 4), fx.stats([1, 2, 4]))
    exec(compile(code, str(DOCS), "exec"), {})
    assert capsys.readouterr().out == "1 rows\n[-0.25 -0.5 ] [2 4]\n"


def test_the_docs_name_every_column_and_every_field_of_the_identity(tmp_path):
    text = DOCS.read_text()
    part = fx.add(tmp_path, [("one", 2, runs(1, 2), [1])])
    for name in [*pq.read_schema(part).names, *PriorIdentity.__dataclass_fields__]:
        assert f"| `{name}` |" in text
