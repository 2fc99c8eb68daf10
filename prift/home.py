"""Where prift keeps what it may make again: the default cache, remembered hashes, built code."""

import os
from pathlib import Path


def cache_home() -> Path:
    """$XDG_CACHE_HOME/prift or ~/.cache/prift."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prift"
