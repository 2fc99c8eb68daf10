"""Padded batches of whole examples as transformers has them, for definitions to be naive over."""

import torch
from torch import Tensor


def grid(batch: dict, values_N: Tensor, empty: float = 0) -> Tensor:
    """[B, T]: each label token's value at its own place."""
    found = torch.full_like(batch["input_ids"], empty, dtype=values_N.dtype)
    found.view(-1)[batch["tokens"]["place"] + 1] = values_N
    return found


def labels_of(batch: dict) -> Tensor:
    """int64 [B, T], -100 where there is no label."""
    return grid(batch, batch["tokens"]["target"], -100)


def plain(batch: dict) -> dict[str, Tensor]:
    """What a model's own forward takes."""
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    return {**tensors, "labels": labels_of(batch)}
