"""Whether a head is understood: compared with the model's own logits, not trusted.

Architectures do more between hidden states and logits than their configs say. What prift read
from a model (heads.py) is tried on a few tokens before anything rests on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prift.errors import ModelError
from prift.heads import Head, accepted, body_of, head_of, run_body
from prift.products import project

_ENLARGED = 60.0  # largest logit of the enlarged check: caps in use are 15 to 50


def head_or_reason(model: nn.Module) -> Head | str:
    """The head that makes the model's own logits of its hidden states, or why prift knows none.

    For who can do with the model's full logits instead; `check_head` is for who cannot.
    """
    try:
        head = head_of(model)
        return misfit(model, head) or head
    except ModelError as error:
        return str(error)


def check_head(model: nn.Module, head: Head) -> None:
    """Raises ModelError where `head` does not make the model's own logits."""
    reason = misfit(model, head)
    if reason is not None:
        raise ModelError(f"{reason} Statistics and gradients would be wrong, so nothing was done.")


@torch.no_grad()
def misfit(model: nn.Module, head: Head) -> str | None:
    """Why `head` is not what makes the model's logits, or None where it is. Raises ModelError
    where the model has no body that could be run alone.

    Compares with the model's own logits on a few tokens, as they are and enlarged, since a soft
    cap hardly shows where logits are small, and half precision would hide it. A difference beyond
    the rounding of the model's dtype means that the architecture does something to its logits
    that `head_of` does not know.
    """
    body, ids = body_of(model), _probe(model)
    excess, worst = float("inf"), float("inf")
    with evaluating(model):
        hidden = run_body(body, ids, head)
        if hidden.shape[-1] == head.weight.shape[1]:
            excess, worst = _largest_excess(model, body, head, ids, hidden)
    if excess <= 0:
        return None
    return (
        f"prift does not understand how {type(model).__name__} makes its logits: made again from "
        f"the same hidden states they differ by {worst:.3g}."
    )


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Raises ModelError where a token's logits depend on the tokens behind it.

    Then there is no probability of a token given those before it, and padding would change it.
    """
    ids = _probe(model)
    other = torch.cat([ids[:, :-3], ids[:, :3]], 1)
    with evaluating(model):
        one, two = (_own_logits(model, i)[:-3] for i in (ids, other))
    eps = torch.finfo(model.dtype).eps
    # Experts see other groups of tokens, so their sums may round differently.
    allowed = eps * (64 if eps < 1e-5 else 8) * one.nan_to_num(0.0, 0.0, 0.0).abs().max()
    if (one - two).nan_to_num(0.0, 0.0, 0.0).abs().max() > allowed:
        raise ModelError(
            f"{type(model).__name__} is no causal language model as configured: what it says about "
            "a token depends on the tokens behind it."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout and noise, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _probe(model: nn.Module) -> Tensor:
    """A few token ids [1, 16] from all over the vocabulary."""
    weight = model.get_input_embeddings().weight
    return torch.linspace(0, weight.shape[0] - 1, 16, device=weight.device).long()[None]


def _own_logits(model: nn.Module, ids_1T: Tensor) -> Tensor:
    """float32 [T, V]."""
    return model(input_ids=ids_1T, **accepted(model, {"use_cache": False})).logits[0].float()


def _largest_excess(
    model: nn.Module, body: nn.Module, head: Head, ids_1T: Tensor, hidden_1TH: Tensor
) -> tuple[float, float]:
    """(difference beyond rounding, largest difference) of the hidden states and their multiple."""
    raw = project(hidden_1TH[0], head.weight).nan_to_num(0.0, 0.0, 0.0)
    largest = raw.abs().max().clamp_min(1e-6)
    for factor in (1.0, float(_ENLARGED / largest / abs(head.scale))):
        chosen = hidden_1TH * factor
        ours = head.logits(chosen[0])
        hook = body.register_forward_hook(lambda *call, h=chosen: _with_hidden(call[-1], h))
        try:
            theirs = _own_logits(model, ids_1T).to(ours.device)
        finally:
            hook.remove()
        excess, worst = _excess(ours, theirs, torch.finfo(head.weight.dtype).eps)
        if not excess <= 0:  # NaN too
            break
    return excess, worst


def _with_hidden(answer: Any, hidden_BTH: Tensor) -> Any:
    answer.last_hidden_state = hidden_BTH
    return answer


def _excess(ours: Tensor, theirs: Tensor, eps: float) -> tuple[float, float]:
    """(difference beyond the rounding of a few operations, largest difference)."""
    if ours.shape != theirs.shape:
        return float("inf"), float("inf")
    alike = (ours.isnan() & theirs.isnan()) | (ours == theirs)  # broken weights: scoring says
    difference = (ours - theirs).masked_fill(alike, 0).abs()
    size = theirs.nan_to_num(0.0, 0.0, 0.0).abs()
    # float32 sums differ with the shape of the product; half precision rounds each result, and
    # once more the hidden states where they are scaled (MiniCPM3).
    allowed = eps * (2 * size + (8.0 if eps < 1e-5 else 0.5) * size.max())
    return float((difference - allowed).max()), float(difference.max())
