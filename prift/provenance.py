"""What explains the numbers of a part: names and versions, no paths of this machine, no text."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prift.dataspec import DataSpec
from prift.tokenizers import template_digest, tokenizer_digest

_PACKAGES = ("prift", "torch", "transformers", "pyarrow", "numpy")


def provenance(
    model: str, folder: Path, tokenizer: Any, spec: DataSpec, device: str, options: dict[str, Any]
) -> dict[str, str]:
    """Metadata for CacheWriter: one JSON object under the key "prift".

    model, folder  what was asked for, and where it was found
    options        further facts, as they are
    """
    on_hub = not Path(model).expanduser().exists()
    facts = {
        "model": model if on_hub else folder.resolve().name,
        "revision": folder.name if on_hub else None,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer),
        "data": [Path(d).name for d in spec.data],
        "max_length": spec.text.max_length,
        **options,
        "packages": {p: version(p) for p in _PACKAGES},
        "device": device,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {"prift": json.dumps(facts, sort_keys=True)}
