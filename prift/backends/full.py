"""Statistics from a model's own logits, for architectures whose head prift does not know.

Dearer in time and memory: every position of every sequence meets the whole vocabulary. The logits
have the model's dtype, so that float32 logits need a float32 model.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prift.backends.bodies import pad, pick, tensor
from prift.heads import accepted
from prift.stats import TokenStats, token_stats

_LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_BLOCK_ROWS = 256


def most_tokens(device: torch.device, vocabulary: int) -> int:
    """Padded tokens whose logits keep to a bound on memory."""
    return max(1, _LOGITS_BYTES.get(device.type, 1 << 30) // (4 * vocabulary))


def full_stats(
    model: nn.Module,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    *,
    logits_dtype: str,
    names: Sequence[str],
    sums: Callable[..., Tensor],
) -> TokenStats:
    """Statistics [N] of all positions of all sequences, joined in order."""
    device = model.get_input_embeddings().weight.device
    known = accepted(model, {"use_cache": False})
    answer = model(input_ids=tensor(pad(sequences), device), **known)
    z_NV = pick(answer.logits, positions)
    if logits_dtype == "bfloat16":
        z_NV = z_NV.bfloat16()
    targets = np.concatenate([s[p] for s, p in zip(sequences, positions, strict=True)])
    targets_N = tensor(targets, z_NV.device)
    return token_stats(z_NV, targets_N, names, block_rows=_BLOCK_ROWS, sums=sums)
