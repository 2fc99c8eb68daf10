"""The weighted loss inside the model's own forward, so that every hook and wrapper fires.

`install` replaces `forward` on one model and on its output projection, and `uninstall` takes both
away again. Called without `weighted`, the model answers as it always did (generation, for one).
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prift.errors import ModelError
from prift.headcheck import check_head
from prift.heads import Head, accepted, body_of, head_of
from prift.loss import Kernel, weighted_loss
from prift.packing import body_arguments
from prift.roles import RESPONSE
from prift.stats import TokenStats
from prift.weigher import Weigher


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """The label tokens of a batch of input ids [B, T], padded or packed.

    place     int64 [N]: where each is predicted, row * T + column
    target    int64 [N]: the tokens
    sequence  int64 [N]: which of the batch's sequences each belongs to
    role      uint8 [N]: whose words each is, for rules that ask for it
    """

    place: Tensor
    target: Tensor
    sequence: Tensor
    role: Tensor | None = None


class Weighted:
    """What the loss needs to know of a batch.

    tokens     its label tokens, N of them
    prior      the prior's statistics [N] by name; may be empty
    weights    float32 [N], where they are known beforehand
    scale      float32 [N], a factor of each token's loss, or None
    anchor     a factor of each token's k3 to the prior, or None (prift.anchor)
    every_nll  also compute the nll of tokens whose weight is zero

    Neither mapping nor dataclass, since wrappers look into those: FSDP2's mixed precision would
    round the statistics to bfloat16, and with them the weights.
    """

    __slots__ = ("anchor", "every_nll", "prior", "scale", "tokens", "weights")

    def __init__(
        self,
        tokens: LabelTokens,
        prior: dict[str, Tensor],
        every_nll: bool = False,
        weights: Tensor | None = None,
        scale: Tensor | None = None,
        anchor: float | Tensor | None = None,
    ):
        self.tokens, self.prior, self.every_nll = tokens, prior, every_nll
        self.weights, self.scale, self.anchor = weights, scale, anchor

    @staticmethod
    def of(
        labels_BT: Tensor, prior_BT: dict[str, Tensor], roles_BT: Tensor | None = None
    ) -> "Weighted":
        """Of a padded batch's labels as transformers has them, each at its token's own place and
        -100 where there is none, and of statistics and roles (uint8) at the same places; without
        roles all are a response's."""
        row, column = (labels_BT[:, 1:] != -100).nonzero(as_tuple=True)
        places, targets = row * labels_BT.shape[1] + column, labels_BT[row, column + 1]
        roles = torch.full_like(row, RESPONSE) if roles_BT is None else roles_BT[row, column + 1]
        tokens = LabelTokens(places, targets, row, roles.to(torch.uint8))
        return Weighted(tokens, {n: values[row, column + 1] for n, values in prior_BT.items()})


def install(model: nn.Module, weigher: Weigher, kernel: Kernel | None = None) -> None:
    """Teaches a transformers causal LM `forward(..., weighted=Weighted(...))`.

    The answer is then a dict: loss (sum over label tokens), nll [N], weights [N], auxiliary
    (scalar). A packed batch says where its sequences end (cu_seq_lens_q, max_length_q), and is run
    within `packing.varlen_attention`. Raises ModelError where the model's head is not understood.
    """
    check_head(model, head_of(model))
    _check_router(model)
    plain, body, projection = model.forward, body_of(model), model.get_output_embeddings()
    project = projection.forward

    def forward_projection(hidden: Tensor, weighted: Weighted | None = None) -> Any:
        if weighted is None:
            return project(hidden)
        # Only here are the projection's weights whole where it is sharded by itself (FSDP2).
        return _loss(hidden, head_of(model), weigher, weighted, kernel)

    def forward(*args: Any, weighted: Weighted | None = None, **inputs: Any) -> Any:
        if weighted is None:
            return plain(*args, **inputs)
        # No mask: padding is on the right, where a causal model's tokens never look, and
        # attention without a mask takes its fast causal path. Only the router's balance needs it.
        mask_BT = inputs.pop("attention_mask", None)
        optional = {"position_ids": inputs.pop("position_ids", None), "use_cache": False}
        inputs |= accepted(body, optional) | _router_arguments(model)  # state spaces take neither
        if "cu_seq_lens_q" in inputs:
            inputs |= body_arguments(inputs["cu_seq_lens_q"], inputs["max_length_q"])
        answer = body(*args, **inputs)
        loss, nll_N, weights_N = projection(answer.last_hidden_state, weighted=weighted)
        return {
            "loss": loss,
            "nll": nll_N,
            "weights": weights_N,
            "auxiliary": _auxiliary_loss(model, answer, mask_BT),
        }

    model.forward, projection.forward = forward, forward_projection


def uninstall(model: nn.Module) -> None:
    """Leaves the model with the `forward` of its class, as before `install`: it can be pickled."""
    for module in (model, model.get_output_embeddings()):
        for name in ("forward", "_original_forward"):  # accelerate keeps the latter under autocast
            vars(module).pop(name, None)


@torch.compiler.disable  # it looks at values (which weights are zero) and keeps its own gradients
def _loss(
    hidden_BTH: Tensor, head: Head, weigher: Weigher, weighted: Weighted, kernel: Kernel | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll [N], weights [N]): a tuple, in which wrappers look for what has a gradient."""
    tokens = weighted.tokens
    out = weighted_loss(
        hidden_BTH.flatten(0, 1)[tokens.place].to(head.weight.dtype),
        head,
        tokens.target,
        weigher,
        TokenStats(**weighted.prior),
        weights_N=weighted.weights,
        scale_N=weighted.scale,
        sequence_N=tokens.sequence,
        role_N=tokens.role,
        anchor=weighted.anchor,
        every_nll=weighted.every_nll,
        kernel=kernel,
    )
    return out.loss, out.nll, out.weights


def _router_arguments(model: nn.Module) -> dict[str, bool]:
    wanted = getattr(model.config, "output_router_logits", False)
    return {"output_router_logits": True} if wanted else {}


def _check_router(model: nn.Module) -> None:
    wanted = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
    known = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    if _router_arguments(model) and not (known and all(hasattr(model, n) for n in wanted)):
        raise ModelError(
            f"the config asks for {type(model).__name__}'s router balance loss, which prift does "
            "not know how to add. Set output_router_logits to false in its config.json."
        )


def _auxiliary_loss(model: nn.Module, answer: Any, mask_BT: Tensor | None) -> Tensor:
    """The mixture-of-experts balance loss that the model's own forward would add, or zero."""
    if not _router_arguments(model):
        return torch.zeros((), device=answer.last_hidden_state.device)
    balance = sys.modules[type(model).__module__].load_balancing_loss_func
    loss = balance(answer.router_logits, model.num_experts, model.num_experts_per_tok, mask_BT)
    return model.router_aux_loss_coef * loss
