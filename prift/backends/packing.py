"""Sequences laid end to end without padding, on devices that have variable-length attention."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prift.backends.bodies import tensor
from prift.heads import Head
from prift.packing import (
    kernel_refusal,
    laid_end_to_end,
    packed_hidden,
    refusal,
    varlen_attention,
)


def can_pack(model: nn.Module) -> bool:
    """Whether it may be tried: as far as device, dtype and config tell."""
    on_cuda = all(p.device.type == "cuda" for p in model.parameters())
    if not on_cuda or refusal(model) is not None:
        return False
    return kernel_refusal(model.get_input_embeddings().weight.device, model.dtype) is None


def packed_rows(
    model: nn.Module,
    head: Head,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    device: torch.device,
) -> Tensor:
    """Hidden states [N, H] that predict `positions` of all sequences, joined in order.

    device  where the body takes its ids
    """
    lengths = np.array([len(s) for s in sequences])
    ends, places = laid_end_to_end(lengths)
    before = np.concatenate([p - 1 + e for p, e in zip(positions, ends, strict=False)])
    with varlen_attention(model):
        hidden_TH = packed_hidden(
            model,
            tensor(np.concatenate(sequences), device),
            tensor(places, device),
            tensor(ends, device).int(),
            int(lengths.max()),
        )
    return hidden_TH.to(head.weight)[tensor(before, head.weight.device)]
