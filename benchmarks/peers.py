"""Who prift's training is compared with: plain Trainer, TRL's, and the authors' online reference.

The authors' training is rewritten from its description (arXiv 2606.09396 and docs/methods.md), not
from their code: a frozen copy of the pretrained model stays in memory; each micro-batch goes
through it too, a softmax in float32 over all its logits gives every token's score, the scores give
the weights, and those weigh a cross-entropy over the trainee's full logits, taken in float32 as
transformers takes its own.
"""

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.references import online_score
from tests.toy_tokenizers import byte_level

TRL = ("trl-nll", "trl-dft") if importlib.util.find_spec("trl") else ()
"""TRL's default loss and its dft, where TRL is installed."""


def shell(model: nn.Module) -> nn.Module:
    """A copy whose parameters are the model's own: its forward can be replaced alone."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def frozen(model: nn.Module) -> nn.Module:
    """A second model in memory, never trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def online_loss(
    model: nn.Module, reference: nn.Module, inputs: dict[str, Tensor], count: int | Tensor
) -> Tensor:
    """PriFT-mass with an online reference, divided by `count` label tokens."""
    inputs = dict(inputs)
    targets = inputs.pop("labels")[:, 1:].reshape(-1)
    labelled = targets != -100
    with torch.no_grad():
        logits = reference(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        _, score = online_score(logits, targets.clamp_min(0))
        weights = (score >= 0.5).float()
        del logits
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    nll = nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    return (nll * weights * labelled).sum() / count


class OnlineTrainer(tf.Trainer):
    """transformers.Trainer with the authors' loss; the reference is a copy made at the start."""

    def __init__(self, *args: Any, reference_dtype: torch.dtype, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self._reference = frozen(self.model).to(reference_dtype)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        return online_loss(model, self._reference, inputs, num_items_in_batch)


class Padded:
    """Collator of plain SFT: pads on the right to the longest, or to `length` where it is given."""

    def __init__(self, length: int | None = None):
        self._length = length

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        shape = len(items), self._length or max(len(item["input_ids"]) for item in items)
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
        }
        for b, item in enumerate(items):
            size = min(len(item["input_ids"]), shape[1])
            batch["input_ids"][b, :size] = torch.tensor(item["input_ids"][:size])
            batch["labels"][b, :size] = torch.tensor(item["labels"][:size])
            batch["attention_mask"][b, :size] = 1
        return batch


def trl_trainer(
    variant: str, model: nn.Module, rows: list[dict[str, list[int]]], arguments: dict[str, Any]
) -> tf.Trainer:
    """TRL's SFTTrainer over rows of token ids, with its own collator and fused head.

    Gradient checkpointing, which it turns on by default, is off as it is for all others.
    """
    from trl import SFTConfig, SFTTrainer

    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    given = {"bf16": False, "gradient_checkpointing": False} | arguments
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(loss_type=variant.removeprefix("trl-"), max_length=None, **given),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    if not shown:
        datasets.enable_progress_bars()
    return trainer
