"""Whether a model keeps packed sequences apart: tried on a few, not trusted.

Their hidden states are compared with those the sequences have alone, and with those they have
beside others: in half precision rounding may hide a neighbour's influence from the first
comparison, and not from the second, where all is computed alike. What each layer asks of its
attention is compared with what the config says: a few short sequences would not show a window.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prift.errors import ModelError, first_line
from prift.headcheck import evaluating
from prift.heads import Head, body_of, head_of, run_body
from prift.memory import is_out_of_memory
from prift.packing import (
    attend,
    laid_end_to_end,
    packed_hidden,
    refusal,
    varlen_attention,
    windows,
)

_SEEN = 1 / 16, 1e-6
"""Relative difference that other sequences' tokens may make, in units of the dtype, or at least:
what adds up in another order where experts sort tokens. All else comes out to the bit."""
_WORST_ROW = 0.3  # relative difference of one row: more than rounding makes of any


def check_packing(model: nn.Module) -> None:
    """Raises ModelError where a model about to be trained, on its device, cannot be run on packed
    sequences. Call it under the run's autocast."""
    sequences = [_spread(model, length) for length in (7, 1, 24, 12)]
    with evaluating(model):
        reason = refusal(model) or packing_misfit(model, head_of(model), sequences, training=True)
    if reason is not None:
        raise ModelError(
            f"--packing: {type(model).__name__} cannot run packed sequences: {reason}. Leave "
            "--packing out: batches are then padded, and grouped by length so that little is lost."
        )


def _spread(model: nn.Module, length: int) -> np.ndarray:
    """Token ids from all over the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    return np.linspace(0, rows - 1, length).astype(np.int32)


@torch.no_grad()
def packing_misfit(
    model: nn.Module, head: Head, sequences: Sequence[np.ndarray], training: bool = False
) -> str | None:
    """Why the model's hidden states of these sequences packed are not those they have alone, or
    None where they are, to rounding. Raises where memory does not suffice to tell.

    training  also whether the attention of each layer has a gradient, and no dropout
    """
    try:
        return _misfit(model, head, sequences, training)
    except Exception as error:  # an architecture's own way of refusing
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"


def _misfit(
    model: nn.Module, head: Head, sequences: Sequence[np.ndarray], training: bool
) -> str | None:
    device = model.get_input_embeddings().weight.device
    asked: list[tuple[nn.Module, dict[str, Any]]] = []

    def recorded(module: nn.Module, *tensors: Any, **options: Any) -> Any:
        asked.append((module, options))
        if training:
            _differentiate(module, tensors, options)
        return attend(module, *tensors, **options)

    ends, places = laid_end_to_end([len(s) for s in sequences])
    given = np.concatenate(sequences).astype(np.int64), places, ends
    tensors = [torch.from_numpy(array).to(device) for array in given]
    longest = max(map(len, sequences))
    with varlen_attention(model, recorded):
        found = packed_hidden(model, *tensors, longest)
    config = model.config.get_text_config()
    if len(asked) != config.num_hidden_layers:
        return (
            f"{len(asked)} of its {config.num_hidden_layers} layers attend by transformers' means"
        )
    if [options.get("sliding_window") for _, options in asked] != windows(config):
        return "it tells its layers' windows by the mask alone, which packed sequences have not"
    with varlen_attention(model):
        seen = _seen(model, tensors, longest, found)
    if not seen <= max(_SEEN[0] * torch.finfo(computed_in(model)).eps, _SEEN[1]):
        return f"sequences see each other, relative difference {seen:.2g}"
    if training:
        for module, _ in asked:
            module.training = True  # the attention alone: nothing else makes noise
        with varlen_attention(model):
            packed_hidden(model, *tensors, longest)
    body = body_of(model)
    one = [torch.from_numpy(s.astype(np.int64))[None].to(device) for s in sequences]
    alone = [run_body(body, ids_1T, head)[0] for ids_1T in one]
    return difference(found.to(head.weight), torch.cat(alone), computed_in(model))


def _seen(model: nn.Module, tensors: list[Tensor], longest: int, found_TH: Tensor) -> float:
    """How much hidden states of every second sequence change with the tokens of the others."""
    ids_T, places_T, ends = tensors
    own_T = torch.searchsorted(ends[1:], torch.arange(len(ids_T), device=ends.device), right=True)
    kept_T = own_T % 2 == 1
    rows = model.get_input_embeddings().weight.shape[0]
    others_T = torch.where(kept_T, ids_T, (ids_T + rows // 2) % rows)
    again_TH = packed_hidden(model, others_T, places_T, ends, longest)[kept_T].double()
    kept_TH = found_TH[kept_T].double()
    apart = (again_TH - kept_TH).masked_fill(again_TH.isnan() & kept_TH.isnan(), 0)
    return float(apart.norm() / kept_TH.nan_to_num().norm().clamp_min(1e-30))


def _differentiate(module: nn.Module, tensors: tuple[Any, ...], options: dict[str, Any]) -> None:
    query, key, value, mask = tensors
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out, _ = attend(module, *leaves, mask, **options)
        torch.autograd.grad(out.sum(), leaves)


def computed_in(model: nn.Module) -> torch.dtype:
    """The dtype of the model's products: under autocast another than its weights'."""
    kind = model.get_input_embeddings().weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def difference(found_NH: Tensor, wanted_NH: Tensor, dtype: torch.dtype) -> str | None:
    """How far rows are from those wanted, where that is more than `dtype` explains, or None."""
    # NaN in both is the weights' fault, which scoring reports.
    same = (found_NH == wanted_NH) | (found_NH.isnan() & wanted_NH.isnan())
    missed_N = (found_NH.double() - wanted_NH).masked_fill(same, 0).norm(dim=1)
    size_N = wanted_NH.double().nan_to_num().norm(dim=1).clamp_min(1e-30)
    relative = float(missed_N.norm() / size_N.norm())
    fits = relative <= torch.finfo(dtype).eps ** 0.5
    if fits and (missed_N <= _WORST_ROW * size_N).all():
        return None
    return f"relative difference {relative:.2g}"
