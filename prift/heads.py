"""What an architecture does between hidden states and logits; stages 1 and 2 share it.

A causal language model is a body, which ends in hidden states, and a head, which makes logits of
them: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap). prift runs the two
apart, so that prompt rows never meet the vocabulary. Logits are float32 whatever the weights are:
rounding them to bfloat16 ties a tenth or more of all targets with another token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prift.errors import ModelError
from prift.products import project

_ENLARGED = 60.0  # largest logit of the enlarged check: caps in use are 15 to 50


@dataclass(frozen=True, slots=True)
class Head:
    """Output projection of a causal language model.

    weight   [V, H] in the model's dtype (the embedding itself where tied)
    bias     [V] or None
    scale    factor on the logits (Cohere's logit_scale, Granite's 1 / logits_scaling)
    softcap  logits become softcap * tanh(logits / softcap); None = not (Gemma's
             final_logit_softcapping)
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """float32 logits [N, V] of hidden states [N, H]."""
        z_NV = project(hidden_NH, self.weight)
        if self.bias is not None:
            z_NV += self.bias
        return self.finish(z_NV)

    def finish(self, z_NV: Tensor) -> Tensor:
        """Scales and caps the raw projection, in place."""
        if self.scale != 1.0:
            z_NV *= self.scale
        if self.softcap is not None:
            z_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_NV

    def chain(self, grad_NV: Tensor, z_NV: Tensor) -> Tensor:
        """Gradient at the raw projection from the gradient at the logits `z_NV`, in place."""
        if self.softcap is not None:
            grad_NV *= 1 - (z_NV / self.softcap).square_()
        if self.scale != 1.0:
            grad_NV *= self.scale
        return grad_NV


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in hidden states. Raises ModelError."""
    body = model.base_model
    if body is model:
        raise ModelError(
            f"{type(model).__name__} does not separate its body from its output projection, so "
            "prift cannot run one without the other. Use another model class."
        )
    return body


def head_of(model: nn.Module) -> Head:
    """The head of a transformers causal language model, read from its modules and config.

    What a config does not name in the ways known here is caught by `check_head`.
    Raises ModelError for a model without a linear output projection.
    """
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear):
        raise ModelError(
            f"the output projection of {type(model).__name__} is no plain linear layer: found "
            f"{type(projection).__module__}.{type(projection).__qualname__}. Adapters on it "
            "(--lora-target) and quantised projections are not supported."
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(projection.weight, projection.bias, float(scale), softcap)


@torch.no_grad()
def check_head(model: nn.Module, head: Head) -> None:
    """Compares `head` with the model's own logits on a few tokens, as they are and enlarged.

    Enlarged, because a soft cap hardly shows where logits are small, and half precision would
    hide it. Raises ModelError where they differ by more than the rounding of the model's dtype:
    then the architecture does something to its logits that `head_of` does not know.
    """
    training, body = model.training, body_of(model)
    model.eval()
    vocabulary = head.weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, 16, device=head.weight.device).long()[None]
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    largest = project(hidden[0], head.weight).nan_to_num(0.0).abs().max().clamp_min(1e-6)
    for factor in (1.0, float(_ENLARGED / largest / abs(head.scale))):
        chosen = hidden * factor
        ours = head.logits(chosen[0])
        hook = body.register_forward_hook(lambda *call, h=chosen: _with_hidden(call[-1], h))
        try:
            theirs = model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            hook.remove()
        excess, worst = _excess(ours, theirs, torch.finfo(head.weight.dtype).eps)
        if not excess <= 0:
            raise ModelError(
                f"prift does not understand how {type(model).__name__} makes its logits: made "
                f"again from the same hidden states they differ by {worst:.3g}. Statistics and "
                "gradients would be wrong, so nothing was done."
            )
    model.train(training)


def _with_hidden(answer: Any, hidden_BTH: Tensor) -> Any:
    answer.last_hidden_state = hidden_BTH
    return answer


def _excess(ours: Tensor, theirs: Tensor, eps: float) -> tuple[float, float]:
    """(difference beyond the rounding of a few operations, largest difference)."""
    if ours.shape != theirs.shape:
        return float("inf"), float("inf")
    both_nan = ours.isnan() & theirs.isnan()  # broken weights: scoring names the example
    difference = (ours - theirs).masked_fill(both_nan, 0).abs()
    size = theirs.nan_to_num(0.0).abs()
    # float32 sums differ with the shape of the product; half precision rounds each result.
    allowed = eps * (2 * size + (8.0 if eps < 1e-5 else 0.02) * size.max())
    return float((difference - allowed).max()), float(difference.max())
