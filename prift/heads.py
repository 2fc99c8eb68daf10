"""What an architecture does between hidden states and logits; stages 1 and 2 share it.

A causal language model is a body, which ends in hidden states, and a head, which makes logits of
them: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap). prift runs the two
apart, so that prompt rows never meet the vocabulary. Logits are float32 whatever the weights are:
rounding them to bfloat16 ties about a tenth of all targets with another token
(docs/precision.md).
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prift.errors import ModelError
from prift.products import project

_SCALES = {  # config name -> power of its factor on the logits
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_scaling": -1,  # Granite; MiniCPM3, on the hidden states
    "logits_mup_width_multiplier": -1,  # Inkling, on the hidden states
}
_OTHER_SCALES = {  # model types that mean something else by the same name
    "hyperclovax": {"logits_scaling": 1},
    "mpt": {"logit_scale": 0},  # in the config, and unused
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Gemma and NanoChat; RecurrentGemma; xLSTM


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

    def part(self, tokens: slice | Tensor) -> "Head":
        """The head of these tokens only: a view for a slice, a copy for int64 indices."""
        bias = None if self.bias is None else self.bias[tokens]
        return replace(self, weight=self.weight[tokens], bias=bias)

    def logits(self, hidden_NH: Tensor, out_NV: Tensor | None = None) -> Tensor:
        """float32 logits [N, V] of hidden states [N, H], in `out_NV` where it is given."""
        z_NV = project(hidden_NH, self.weight, out_NV)
        if self.bias is not None:
            z_NV += self.bias
        return self.finish(z_NV)

    def rounded(self, hidden_NH: Tensor) -> Tensor:
        """bfloat16 logits [N, V]: a bfloat16 model's own, every step rounded as there; those of
        another dtype rounded once, at the end."""
        if self.weight.dtype != torch.bfloat16:
            return self.logits(hidden_NH).bfloat16()
        return self.finish(nn.functional.linear(hidden_NH, self.weight, self.bias))

    def finish(self, z_NV: Tensor) -> Tensor:
        """Scales and caps the raw projection, in place."""
        if self.scale != 1.0:
            z_NV *= self.scale
        if self.softcap is not None:
            z_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_NV

    def chain(self, grad_NV: Tensor, z_NV: Tensor | None) -> Tensor:
        """Gradient at the raw projection from the gradient at the logits, in place.

        z_NV  the logits, where there is a soft cap
        """
        if self.softcap is not None:
            grad_NV *= 1 - (z_NV / self.softcap).square_()
        if self.scale != 1.0:
            grad_NV *= self.scale
        return grad_NV


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in hidden states. Raises ModelError."""
    body = model.base_model
    if body is model:
        body = getattr(model, "model", model)  # Llama 4 names a prefix that it has not
    # OPT and the decoders of encoder-decoder families: the model's own forward runs this part.
    inner = getattr(body, "decoder", None)
    body = inner if hasattr(inner, "config") else body
    if body is model:
        raise ModelError(
            f"{type(model).__name__} does not separate its body from its output projection, so "
            "prift cannot run one without the other. Use another model class."
        )
    return body


def run_body(body: nn.Module, ids_BT: Tensor, head: Head) -> Tensor:
    """Hidden states [B, T, H] of int64 ids padded on the right, as `head` takes them.

    Neither attention mask nor position ids. A causal model's tokens never see the padding behind
    them (headcheck.check_causal), without a mask attention takes its fast causal path, and every
    model counts positions from its own first one: RoBERTa's is not 0, state space models have none.
    The answer has the dtype of the head's weights, to which a body that ends in float32 (Mamba) is
    rounded by its own model too, and their device: a tied projection of a model on several devices
    lies with the embedding. Raises ModelError for a body that answers something else.
    """
    answer = body(input_ids=ids_BT, **accepted(body, {"use_cache": False}))
    if getattr(answer, "last_hidden_state", None) is None:
        raise ModelError(f"{type(body).__name__} answers without last_hidden_state.")
    return answer.last_hidden_state.to(head.weight)


def accepted(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the module's forward names; some refuse what they do not."""
    names = inspect.signature(module.forward).parameters
    return {name: value for name, value in arguments.items() if name in names}


def head_of(model: nn.Module) -> Head:
    """The head of a transformers causal language model, read from its modules and config.

    What a config does not name in the ways known here is caught by `headcheck.misfit`.
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
    powers = _SCALES | _OTHER_SCALES.get(config.model_type, {})
    scale = 1.0
    for name, power in powers.items():
        scale *= float(getattr(config, name, None) or 1.0) ** power
    softcap = next((c for n in _SOFTCAPS if (c := getattr(config, n, None)) is not None), None)
    head = Head(projection.weight, projection.bias, scale, softcap)
    rows = getattr(config, "unpadded_vocab_size", None)  # Inkling drops the logits of padding rows
    return head.part(slice(rows)) if rows else head
