"""prift: token weights from the pretrained model, computed once, stored, and trained with.

Two stages share nothing but a folder of Parquet: `prift precompute` writes what the pretrained
model thought of every token, `prift train` turns that into weights (arXiv 2606.09396).
"""

__version__ = "0.1.0"

_EXPORTS = {
    "PriorCache": "prift.cache",
    "attach": "prift.columns",
    "list_priors": "prift.cache",
    "look_up": "prift.columns",
    "open_prior": "prift.choice",
    "sequence_key": "prift.cache",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    """What other programs call, imported when it is asked for: `import prift` costs nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'prift' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
