"""transformers.Trainer with a weighted loss, honest metrics and what cut batches need of it.

The loss of a step is the sum over its label tokens of weight * nll, divided by the number of its
label tokens over all micro-batches and ranks, zero-weight tokens counted, or by what `--normalize`
says. (The code of the PriFT authors divides each micro-batch by its own label tokens and adds up
the gradients: `micro-batch-sum`.) An anchor adds the mean of its factor * k3 over the same tokens.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from prift.forward import LabelTokens, Weighted
from prift.metrics import OF_A_CUT_TOKEN, SUMS, per_token, ratios
from prift.normalizers import LateDivision, is_late, means_averaged
from prift.order import OrderOfEpoch
from prift.watch import LastStepLogged, StepGuard


class PriftTrainer(transformers.Trainer):
    """Trains a model on which `prift.forward.install` was called.

    full_metrics_steps  every so many steps one micro-batch is run without gradient over the
                        zero-weight tokens too, so that `nll` and `drift` cover all label tokens;
                        None = at each logging step
    skips_rows          whether zero-weight tokens are known beforehand and never run
    anchor              a factor of the mean k3 to the prior over label tokens, or None
    guard               looks at each optimiser step before it is taken
    """

    def __init__(
        self,
        *args: Any,
        guard: StepGuard,
        full_metrics_steps: int | None = None,
        skips_rows: bool = False,
        anchor: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, compute_metrics=self._summarise, **kwargs)
        self.model_accepts_loss_kwargs = True  # count label tokens over the whole optimiser step
        self._full_every = full_metrics_steps
        self._skips_rows, self._anchor = skips_rows, anchor
        self._collate = self.data_collator
        self._measured_step = -1
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64)
        normalize, known = self.train_dataset.normalize, self.train_dataset.weighed
        self._late = LateDivision(normalize) if is_late(normalize, known) else None
        self._guard = guard
        guard.scales_loss = self.accelerator.scaler is not None
        self.add_callback(guard)
        self.add_callback(LastStepLogged())

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The micro-batches of one optimiser step; and (denominator, label tokens) over all
        processes, float64 [2], with what was cut off and is in no batch."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        own = [sum(batch[n] for batch in batches) for n in ("denominator", "num_labels")]
        kind = torch.float32 if device.type == "mps" else torch.float64
        return batches, self.accelerator.reduce(torch.tensor(own, dtype=kind, device=device), "sum")

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """By the lengths that are run, which are known; to learn them, transformers would make
        every item. In an order that can be resumed."""
        if self.args.train_sampling_strategy == "group_by_length":
            together = self.args.train_batch_size * self.args.gradient_accumulation_steps
            lengths = (train_dataset or self.train_dataset).lengths.tolist()
            sampler = LengthGroupedSampler(together, lengths=lengths)
        else:
            sampler = super()._get_train_sampler(train_dataset)
        if not hasattr(sampler, "generator"):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return OrderOfEpoch(sampler, lambda: seed + int(self.state.epoch or 0))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Weighted loss of one micro-batch, already divided by the step's denominator."""
        every_nll = not self._skips_rows or self._wants_full_metrics()
        if every_nll and self._skips_rows:
            whole = [self.train_dataset.whole(index) for index in inputs["index"]]
            inputs = self._prepare_inputs(self._collate(whole))
        weighted, num_labels, index = _taken(inputs, every_nll)
        denominator, labels = num_items_in_batch.float()
        share = num_labels / labels  # of this micro-batch in the step
        averaged = self._means_averaged()
        if averaged is not None:
            share = torch.ones_like(labels) / averaged
            denominator = num_labels / share
        denominator = torch.where(denominator > 0, denominator, labels)  # no weight: a zero sum
        if self._anchor is not None:
            weighted.anchor = self._anchor * denominator / labels  # per label token, in the end
        tokens, columns = weighted.tokens, inputs["position_ids"].flatten()
        out = model(**inputs, weighted=weighted)

        def name(n: int) -> str:
            where = self.train_dataset.examples.where(index[tokens.sequence[n]])
            return f"token {int(columns[tokens.place[n]]) + 1} of {where}"

        if self._late is not None:
            self._late.see(out["weights"])
        self._guard.see(out["loss"] + out["auxiliary"], out["weights"], name)
        sums = per_token(out, weighted).sum(0)
        sums += (num_labels - len(tokens.place)) * sums.new_tensor(OF_A_CUT_TOKEN)
        self._sums = self._sums.to(sums.device) + sums
        loss = out["loss"] / denominator + out["auxiliary"] * share
        return loss * self.accelerator.num_processes  # data parallelism averages gradients

    def _means_averaged(self) -> int | None:
        """See normalizers; all processes have equally many micro-batches."""
        accumulation = self.current_gradient_accumulation_steps
        normalize = self.train_dataset.normalize
        return means_averaged(normalize, accumulation, self.accelerator.num_processes)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The last micro-batch of a step knows what the step is divided by: its gradient is
        corrected, and the loss of the step with it. Where gradients of means are added up, the
        loss that is logged is the mean all the same."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.train_dataset.normalize == "micro-batch-sum":
            return loss / self.current_gradient_accumulation_steps
        if self._late is None:
            return loss
        self._late.see_loss(loss)
        if not self.accelerator.sync_gradients:
            return loss
        return loss + self._late.finish(model, num_items_in_batch[1], self.accelerator.reduce)

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float:
        """Shows it to the guard: it is the last that is known of a step before it is taken."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._guard.see_norm(norm)
        return norm

    def _wants_full_metrics(self) -> bool:
        """True for the first micro-batch of every step whose metrics cover all label tokens."""
        step = self.state.global_step + 1
        every = self._full_every or self.state.logging_steps or 1
        if step == self._measured_step or not (step == 1 or step % every == 0):
            return False
        self._measured_step = step
        return True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the steps since the last log."""
        if "loss" in logs:
            total = self.accelerator.reduce(self._sums.to(self.args.device), "sum")
            logs |= ratios(dict(zip(SUMS, total.tolist(), strict=True)))
            self._sums.zero_()
            if self._guard.skipped:
                logs["skipped_steps"] = self._guard.skipped
        super().log(logs, start_time)

    def _summarise(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        sums = dict(zip(SUMS, prediction.predictions.sum(0).tolist(), strict=True))
        total = sums["weighted"] + (self._anchor or 0.0) * sums["anchor"]
        return {"loss": total / sums["tokens"], **ratios(sums)}

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums per example [B, len(SUMS)] in the place of logits: exact over any batch or rank."""
        inputs = self._prepare_inputs(inputs)
        weighted, _, index = _taken(inputs, every_nll=True)
        weighted.anchor = self._anchor
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs, weighted=weighted)
        each = per_token(out, weighted)
        sums = each.new_zeros(len(index), len(SUMS))
        sums.index_add_(0, weighted.tokens.sequence, each)
        return None, sums, torch.zeros(len(index), device=sums.device)


def _taken(batch: dict[str, Any], every_nll: bool) -> tuple[Weighted, int, list[int]]:
    """(weighted, num_labels, index) of a batch, which keeps what the model's forward takes."""
    del batch["denominator"]
    weighted = Weighted(
        LabelTokens(**batch.pop("tokens")),
        batch.pop("prior"),
        every_nll,
        batch.pop("weights", None),
        batch.pop("scale"),
    )
    return weighted, batch.pop("num_labels"), batch.pop("index")
