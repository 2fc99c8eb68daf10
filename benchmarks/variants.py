"""What is compared: four ways from hidden rows to statistics, and the floor under them.

    projection    the bare matrix product into one buffer, whole or in tiles, the faster: the floor
    prift         prift.fold, compiled
    prift-eager   the same without torch.compile
    no-compiler   the same without any compiler: torch's own products too
    extended      prift with the extended statistics, which sort whole rows
    softmax-sort  log_softmax, sort, cumulative sum: statistics the obvious way
    online-score  what PriFT's authors compute per batch from a reference model's logits

The last two are those of tests/references.py, in blocks of rows.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from prift import products
from prift.fold import Fold, compiled_sums
from prift.heads import Head
from prift.stats import STATISTICS, tile_sums
from tests.references import online_score, sorted_stats

REFERENCES = {"softmax-sort": sorted_stats, "online-score": online_score}
VARIANTS = ("projection", "prift", "prift-eager", "no-compiler", "extended", *REFERENCES)
BLOCKS = (8, 32, 128)  # rows; each reference is given its fastest
TILES = (2048, 4096, 8192, None)  # columns of the bare product


def runner(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], None]:
    """One pass of a variant over all rows, in its fastest block size, each tried once on a few."""
    if name == "projection":
        sizes, run = [t or len(weight) for t in TILES], bare
        few, whole = (hidden, weight), (hidden, weight)
    elif name in REFERENCES:
        sizes, run = list(BLOCKS), functools.partial(reference, name)
        few, whole = (hidden[:128], weight, targets[:128]), (hidden, weight, targets)
    else:
        compiled = name in ("prift", "extended")
        sums = compiled_sums(hidden.device.type) if compiled else tile_sums
        names = STATISTICS["extended" if name == "extended" else "core"]
        fold = Fold(Head(weight), "float32", names, sums)
        return functools.partial(_fold, fold, hidden, targets, name != "no-compiler")
    times = {size: once(functools.partial(run, *few, size)) for size in sizes}
    return functools.partial(run, *whole, min(times, key=times.get))


def once(way: Callable[[], None]) -> float:
    """Seconds of process CPU time of one call."""
    begin = time.process_time()
    way()
    return time.process_time() - begin


@torch.inference_mode()
def _fold(fold: Fold, hidden: Tensor, targets: Tensor, native: bool) -> None:
    without = patch.object(products, "_is_native", lambda *_: False)
    with contextlib.nullcontext() if native else without:
        fold(hidden, targets)


@torch.inference_mode()
def bare(hidden: Tensor, weight: Tensor, columns: int) -> None:
    buffer = torch.empty(len(hidden) * columns, dtype=hidden.dtype, device=hidden.device)
    for tile in weight.split(columns):
        shape = len(hidden), len(tile)
        torch.mm(hidden, tile.T, out=buffer[: shape[0] * shape[1]].view(shape))


@torch.inference_mode()
def reference(name: str, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> None:
    for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        REFERENCES[name](h @ weight.T, y)
