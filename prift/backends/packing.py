"""Sequences laid end to end without padding, kept apart by torch's variable-length attention.

Only on CUDA and in half precision, which is what torch offers it for; and only for models whose
attention goes through transformers' registry and asks for nothing but a scale and a window.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prift.backends.bodies import tensor
from prift.backends.prompts import can_share
from prift.heads import Head

NAME = "prift_varlen"
_packed: list[tuple[Tensor, int]] = []  # (ends [B + 1], longest) of the sequences being run


def can_pack(model: nn.Module) -> bool:
    """Whether this device and dtype have variable-length attention, and every layer of the model
    attends to all that stands before a token."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    on_cuda = all(p.device.type == "cuda" for p in model.parameters())
    attends = model.config.get_text_config()._attn_implementation == "sdpa"
    # Some models tell their layers' windows by the mask alone, which packing has not.
    return half and on_cuda and attends and can_share(model)


def packed_rows(
    model: nn.Module,
    body: nn.Module,
    head: Head,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    device: torch.device,
) -> Tensor:
    """Hidden states [N, H] that predict `positions` of all sequences, joined in order.

    Raises whatever a model raises that takes its attention from elsewhere.
    """
    lengths = np.array([len(s) for s in sequences])
    ends = np.cumsum([0, *lengths])
    place = np.concatenate([np.arange(n) for n in lengths])
    with _attention(model, tensor(ends, device).int(), int(lengths.max())):
        hidden_TH = body(
            input_ids=tensor(np.concatenate(sequences)[None], device),
            position_ids=tensor(place[None], device),
            use_cache=False,
        ).last_hidden_state[0]
    before = np.concatenate([p - 1 + e for p, e in zip(positions, ends, strict=False)])
    return hidden_TH.to(head.weight)[tensor(before, head.weight.device)]


@contextmanager
def _attention(model: nn.Module, ends: Tensor, longest: int) -> Iterator[None]:
    """Every layer of the model attends within its sequence only."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    _packed.append((ends, longest))
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        _packed.pop()
        for key, config in configs.items():
            config._attn_implementation = before[key]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [1, heads, T, D] -> [1, T, heads, D]."""
    from torch.nn.attention.varlen import varlen_attn

    asked = {n for n in ("softcap", "s_aux", "position_bias") if other.get(n) is not None}
    if attention_mask is not None or asked or not getattr(module, "is_causal", True):
        raise ValueError(f"variable-length attention has no {', '.join(asked) or 'mask'}")
    ends, longest = _packed[-1]
    ends = ends.to(query.device)  # layers of one model may lie on several
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    window = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        query, key, value, ends, ends, longest, longest,
        scale=scaling, window_size=(window, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out[None], None
