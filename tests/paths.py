"""Every way in which prift computes statistics, as functions of logits: one table for the tests.

Each takes float32 logits [N, V] and targets [N] and answers a dict of float64 arrays [N]. The ways
through `Fold` get the logits as a product: hidden states that pick a row, and the rows themselves
as the projection's columns, so that the product is exact; -inf comes in through the bias.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch

from prift.fold import Fold, compiled_sums
from prift.heads import Head
from prift.stats import CORE, EXTENDED, TokenStats, tile_sums, token_stats

ALL = CORE + EXTENDED
Path = Callable[..., dict[str, np.ndarray]]


def _numbers(stats: TokenStats) -> dict[str, np.ndarray]:
    return {n: getattr(stats, n).double().cpu().numpy() for n in stats.names()}


def from_logits(z_NV, targets_N, names=CORE, *, compiled: bool, device: str) -> dict:
    """`token_stats` of whole rows."""
    z = torch.tensor(np.asarray(z_NV, np.float32), device=device)
    sums = compiled_sums(device) if compiled else tile_sums
    with torch.inference_mode():
        return _numbers(token_stats(z, torch.tensor(targets_N, device=device), names, sums=sums))


def from_hidden(z_NV, targets_N, names=CORE, *, compiled: bool, device: str, dtype: str) -> dict:
    """`Fold`, one row of logits at a time; in bfloat16 the logits must be exact in bfloat16."""
    sums = compiled_sums(device) if compiled else tile_sums
    found = []
    for z_V, target in zip(np.asarray(z_NV, np.float32), targets_N, strict=True):
        z = torch.tensor(z_V, device=device)
        finite = torch.where(z == -torch.inf, 0, z).to(getattr(torch, dtype))
        bias = torch.where(z == -torch.inf, z, 0) if (z == -torch.inf).any() else None
        weight = torch.stack([finite, torch.zeros_like(finite)], 1)
        fold = Fold(Head(weight, bias), "float32", names, sums)
        hidden = torch.ones(2, 2, dtype=weight.dtype, device=device)  # the same row twice
        with torch.inference_mode():
            found.append(fold(hidden, torch.tensor([target, target], device=device)))
    return {n: v[::2] for n, v in _numbers(TokenStats.concatenate(found)).items()}


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
PATHS: dict[str, Path] = {}
for _device in DEVICES:
    for _compiled in (False, True):
        _name = f"{_device}-{'compiled' if _compiled else 'eager'}"
        _how = {"compiled": _compiled, "device": _device}
        PATHS[f"{_name}-rows"] = functools.partial(from_logits, **_how)
        PATHS[f"{_name}-fold"] = functools.partial(from_hidden, **_how, dtype="float32")
        PATHS[f"{_name}-fold-bfloat16"] = functools.partial(from_hidden, **_how, dtype="bfloat16")


def representable(z, path: str) -> np.ndarray:
    """The logits as this path can be given them: rounded where it runs in bfloat16."""
    z = np.asarray(z, np.float32)
    if not path.endswith("bfloat16"):
        return z
    return torch.tensor(z).bfloat16().float().numpy()
