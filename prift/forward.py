"""The weighted loss inside the model's own forward, so that every hook and wrapper fires.

`install` replaces `forward` on one instance; nothing of it is saved with the model. Called
without `weighted`, the model answers as it always did (generation, for one).
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prift.errors import ModelError
from prift.headcheck import check_head
from prift.heads import accepted, body_of, head_of
from prift.loss import weighted_loss
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


def install(model: nn.Module, weigher: Weigher) -> None:
    """Teaches a transformers causal LM `forward(..., weighted={...})`.

    `weighted` holds `labels` [B, T], the prior's statistics [B, T] by name, and `every_nll`. The
    answer is then a dict: loss (sum over label tokens), nll [N], weights [N], auxiliary (scalar).
    Raises ModelError where the model's head is not understood.
    """
    check_head(model, head_of(model))
    _check_router(model)
    plain, body = model.forward, body_of(model)

    def forward(*args: Any, weighted: dict[str, Any] | None = None, **inputs: Any) -> Any:
        if weighted is None:
            return plain(*args, **inputs)
        # No mask: padding is on the right, where a causal model's tokens never look, and
        # attention without a mask takes its fast causal path. Only the router's balance needs it.
        mask_BT = inputs.pop("attention_mask", None)
        optional = {"position_ids": inputs.pop("position_ids", None), "use_cache": False}
        inputs |= accepted(body, optional) | _router_arguments(model)  # state spaces take neither
        answer = body(*args, **inputs)
        head = head_of(model)
        tokens = LabelTokens.of(weighted["labels"])
        prior = TokenStats(**{n: tokens.pick(v) for n, v in weighted["prior"].items()})
        out = weighted_loss(
            answer.last_hidden_state[tokens.row, tokens.column].to(head.weight.dtype),
            head,
            tokens.target,
            weigher,
            prior,
            every_nll=weighted["every_nll"],
        )
        return {
            "loss": out.loss,
            "nll": out.nll,
            "weights": out.weights,
            "auxiliary": _auxiliary_loss(model, answer, mask_BT),
        }

    model.forward = forward


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
