"""Hidden states of the rows that predict scored positions, of a batch of padded sequences.

A causal model's tokens never see the padding behind them, so position t of a sequence is position
t of the model whatever else is in the batch. Only LongRoPE looks at the longest of a batch: see
`rope_edge`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prift.heads import Head, run_body
from prift.models import ropes


def tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """int64 on the device; from pinned memory, so that a GPU need not be waited for."""
    made = torch.from_numpy(np.ascontiguousarray(array, np.int64))
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def pad(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [B, T], zeros behind each sequence."""
    ids_BT = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for b, sequence in enumerate(sequences):
        ids_BT[b, : len(sequence)] = sequence
    return ids_BT


def rope_edge(config: Any) -> int:
    """0, or the length beyond which all positions of a batch turn by other angles (LongRoPE)."""
    long = [r for r in ropes(config) if r["rope_type"] == "longrope"]
    return max((r["original_max_position_embeddings"] for r in long), default=0)


def padded_rows(
    body: nn.Module,
    head: Head,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    device: torch.device,
) -> Tensor:
    """Hidden states [N, H] that predict `positions` of all sequences, joined in order.

    device  where the body takes its ids
    """
    hidden_BTH = run_body(body, tensor(pad(sequences), device), head)
    return pick(hidden_BTH, positions)


def pick(hidden_BTH: Tensor, positions: Sequence[np.ndarray]) -> Tensor:
    """[N, H]: position t of sequence b is predicted by the hidden state of position t - 1."""
    rows = np.repeat(np.arange(len(positions)), [len(p) for p in positions])
    before = np.concatenate(positions) - 1
    device = hidden_BTH.device
    return hidden_BTH[tensor(rows, device), tensor(before, device)]
