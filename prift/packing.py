"""Sequences laid end to end without padding, kept apart by torch's variable-length attention.

A packed batch is one row [1, T]. Where its sequences end goes through the model's layers as
transformers' own arguments `cu_seq_lens_q` and `max_length_q`, so that a layer run again for its
gradient (gradient checkpointing) gets the same; without them the attention is torch's plain one,
and a model whose attention was switched answers as it always did.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prift.errors import first_line
from prift.heads import accepted, body_of

NAME = "prift_varlen"
_ATTENDS = {"full_attention", "sliding_attention"}  # kinds of layers that see whole keys
_MORE = {"softcap": "soft caps", "s_aux": "sinks", "position_bias": "position biases"}


def laid_end_to_end(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ends int32 [B + 1], where the sequences begin and end; int64 [T], places within each)."""
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return ends, np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)


def body_arguments(ends: Tensor, longest: int) -> dict[str, Any]:
    """What tells a model's layers where the sequences of a packed batch end.

    ends     int32 [B + 1]
    longest  of the sequences, in tokens
    """
    # transformers hands on a mask of four dimensions as it is, and would else make one [T, T].
    return {
        "attention_mask": ends[None, None, None],
        "cu_seq_lens_q": ends,
        "max_length_q": longest,
    }


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query, key, value [B, heads, T, D] -> [B, T, heads, D]."""
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            raise ValueError("its layers do not hand on where sequences end")
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    asked = [words for name, words in _MORE.items() if options.get(name) is not None]
    asked += ["dropout (set it to 0 in config.json)"] if options.get("dropout") else []
    asked += [] if getattr(module, "is_causal", True) else ["tokens that see those behind them"]
    if asked:
        raise ValueError(f"variable-length attention has no {' and no '.join(asked)}")
    ends = cu_seq_lens_q.to(query.device)  # layers of one model may lie on several
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary embeddings widen what a linear layer made
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    window = options.get("sliding_window")
    seen = (-1 if window is None else window - 1, 0)
    out = _attention(query, key, value, ends, max_length_q, options.get("scaling"), seen)
    return out[None], None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, *options: Any
) -> Tensor:
    """[T, heads, D] of query, key, value [T, heads, D], the latter two of as many heads or fewer.

    options  the scale of the products, and how far a token sees (before it, behind it)
    """
    from torch.nn.attention.varlen import varlen_attn

    scale, seen = options
    fewer = {}
    if query.shape[1] != key.shape[1]:
        if _takes_fewer(varlen_attn):
            fewer = {"enable_gqa": True}
        else:  # torch 2.11
            times = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    return varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=seen, **fewer
    )


@functools.cache
def _takes_fewer(attention: Callable[..., Tensor]) -> bool:
    """Whether it takes keys of fewer heads than the queries have."""
    return "enable_gqa" in inspect.signature(attention).parameters


def packed_hidden(
    model: nn.Module, ids_T: Tensor, places_T: Tensor, ends: Tensor, longest: int
) -> Tensor:
    """Hidden states [T, H] of packed sequences, within `varlen_attention`."""
    answer = body_of(model)(
        input_ids=ids_T[None],
        position_ids=places_T[None],
        use_cache=False,
        **body_arguments(ends, longest),
    )
    return answer.last_hidden_state[0]


@contextmanager
def varlen_attention(model: nn.Module, attention: Callable = attend) -> Iterator[None]:
    """Packed batches may be run: every layer of the model attends through `attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # of batches that are not packed
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def refusal(model: nn.Module) -> str | None:
    """Why the model cannot run packed sequences, as far as its config tells, or None."""
    config = model.config.get_text_config()
    kinds = layer_kinds(config) - _ATTENDS
    if getattr(model, "_is_stateful", False) or kinds:
        found = f" ({', '.join(sorted(kinds))})" if kinds else ""
        return (
            f"some of its layers{found} are not plain attention, but carry a state from token to "
            "token or summarise: sequences would see each other"
        )
    if not accepted(body_of(model), {"position_ids": None}):
        return "it takes no position ids: places would run on through all sequences"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is its own, and cannot be exchanged for a variable-length one"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it soft-caps its attention, which variable-length attention cannot"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks, which variable-length attention has not"
    if config._attn_implementation != "sdpa":
        return (
            f"it runs with --attention {config._attn_implementation}, and variable-length "
            "attention stands in for sdpa alone"
        )
    return None


def layer_kinds(config: Any) -> set[str]:
    """What the layers of a model attend to, in transformers' words."""
    return set(getattr(config, "layer_types", None) or ["full_attention"])


def windows(config: Any) -> list[int | None]:
    """The window of each layer in tokens, None where it sees everything before a token."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def kernel_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch has no variable-length attention, forward and backward, for this device and
    dtype; None where it has."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
        with torch.enable_grad():
            one = torch.ones(3, 1, 64, dtype=dtype, device=device, requires_grad=True)
            out = varlen_attn(one, one, one, ends, ends, 2, 2, window_size=(-1, 0))
            torch.autograd.grad(out.sum(), one)
    except Exception as error:  # each device refuses in its own way
        return f"{type(error).__name__}: {first_line(error)}".split(". ")[0]
    return None
