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
from prift.rules import Weigher
from prift.stats import TokenStats


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """The label tokens of a padded batch [B, T], found once: entry n is predicted at
    (row[n], column[n]) and stands at column[n] + 1.

    row, column, target  int64 [N]
    """

    row: Tensor
    column: Tensor
    target: Tensor

    @staticmethod
    def of(labels_BT: Tensor) -> "LabelTokens":
        """Tokens whose label is not -100. The one place where labels are shifted."""
        row, column = (labels_BT[:, 1:] != -100).nonzero(as_tuple=True)
        return LabelTokens(row, column, labels_BT[row, column + 1])

    def pick(self, values_BT: Tensor) -> Tensor:
        """Entries [N] of a per-token tensor, each at its own token's place."""
        return values_BT[self.row, self.column + 1]


class Weighted:
    """What the loss needs to know of a padded batch.

    labels     int64 [B, T], -100 where there is no label
    prior      the prior's statistics [B, T] by name; may be empty
    every_nll  also compute the nll of tokens whose weight is zero

    Neither mapping nor dataclass, since wrappers look into those: FSDP2's mixed precision would
    round the statistics to bfloat16, and with them the weights.
    """

    __slots__ = ("every_nll", "labels", "prior")

    def __init__(self, labels: Tensor, prior: dict[str, Tensor], every_nll: bool = False):
        self.labels, self.prior, self.every_nll = labels, prior, every_nll


def install(model: nn.Module, weigher: Weigher, kernel: Kernel | None = None) -> None:
    """Teaches a transformers causal LM `forward(..., weighted=Weighted(...))`.

    The answer is then a dict: loss (sum over label tokens), nll [N], weights [N], auxiliary
    (scalar). Raises ModelError where the model's head is not understood.
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
    tokens = LabelTokens.of(weighted.labels)
    prior = TokenStats(**{n: tokens.pick(v) for n, v in weighted.prior.items()})
    out = weighted_loss(
        hidden_BTH[tokens.row, tokens.column].to(head.weight.dtype),
        head,
        tokens.target,
        weigher,
        prior,
        sequence_N=tokens.row,
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
