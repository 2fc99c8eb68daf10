"""docs/cache.md leaves nothing out."""

from pathlib import Path

import pyarrow.parquet as pq

from prift.identity import PriorIdentity
from tests import cache_fixtures as fx
from tests.cache_fixtures import runs

DOCS = Path(__file__).parent.parent / "docs" / "cache.md"


def test_the_docs_name_every_column_and_every_field_of_the_identity(tmp_path):
    text = DOCS.read_text()
    part = fx.add(tmp_path, [("one", 2, runs(1, 2), [1])])
    for name in [*pq.read_schema(part).names, *PriorIdentity.__dataclass_fields__]:
        assert f"| `{name}` |" in text
