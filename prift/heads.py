"""What an architecture does between hidden states and logits; stages 1 and 2 share it.

A causal language model is a body, which ends in hidden states, and a head, which makes logits of
them: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap). prift runs the two
apart, so that prompt rows never meet the vocabulary. Logits are float32 whatever the weights are:
rounding them to bfloat16 ties a tenth or more of all targets with another token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prift.errors import ModelError
from prift.products import project


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
            f"the output projection of {type(model).__name__} is a {type(projection).__name__}, "
            "not a plain linear layer (adapters and quantised projections are not supported)."
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
    """Compares `head` over the body's hidden states with the model's own logits on a few tokens.

    Raises ModelError where they differ by more than the rounding of the model's dtype: then the
    architecture does something to its logits that `head_of` does not know.
    """
    training, device = model.training, head.weight.device
    model.eval()
    ids = torch.arange(8, device=device)[None] * 7 % head.weight.shape[0]
    hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = head.logits(hidden)
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    model.train(training)
    if ours.shape != theirs.shape:
        worst, bound = float("inf"), 0.0
    else:
        both_nan = ours.isnan() & theirs.isnan()  # broken weights: scoring names the example
        worst = float((ours - theirs).masked_fill(both_nan, 0).abs().max())
        size = float(theirs.nan_to_num(0.0).abs().max())
        bound = 8 * torch.finfo(head.weight.dtype).eps * max(1.0, size)
    if not worst <= bound:
        raise ModelError(
            f"prift does not understand how {type(model).__name__} makes its logits: recomputed "
            f"from hidden states they differ by {worst:.3g} (allowed: {bound:.3g}). "
            "Statistics and gradients would be wrong, so nothing was done."
        )
