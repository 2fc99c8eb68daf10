"""What watches a training run: each optimiser step before it is taken, and what is logged last."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from prift.errors import ModelError, PriftError
from prift.output import last_checkpoint
from prift.weigher import Weigher


class LastStepLogged(TrainerCallback):
    """Logs the metrics of the last step, whatever --logging_steps is."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class StepGuard(TrainerCallback, ExportableState):
    """Looks at each optimiser step just before it is taken, all processes together.

    A weight, loss or gradient that may not be ends the run while the parameters are whole. A step
    whose weights are all zero is not taken, since an optimiser would decay and move parameters even
    so; the schedule advances. After a signal the step is taken, a checkpoint written, and the run
    ends.

    weigher   whose weights are looked at
    anchored  whether an anchor pulls at tokens without weight too: then every step is taken
    received  the signal that this process got, or 0
    skipped   steps without weight since the run began; checkpoints carry it
    ended_by  the signal that ends the run, or 0
    """

    def __init__(
        self,
        weigher: Weigher,
        received: Callable[[], int] = lambda: 0,
        anchored: bool = False,
    ):
        self.skipped = self.ended_by = 0
        self._anchored = anchored
        self.scales_loss = False  # float16: an infinite gradient lowers the scale, and is no fault
        self._weigher, self._received = weigher, received
        self._norm: Tensor | float = 0.0
        self._seen: list[tuple[Tensor, Tensor, Callable[[int], str]]] = []

    def see(self, loss: Tensor, weights_N: Tensor, where: Callable[[int], str]) -> None:
        """One micro-batch. where: names the example and token of a weight."""
        self._seen.append((loss.detach(), weights_N, where))

    def see_norm(self, norm: Tensor | float) -> None:
        """The norm of the gradient of the whole step."""
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _forbidden(self, weights_N: Tensor) -> Tensor:
        """bool [N]: NaN, infinite, or negative where the rule never is."""
        allowed = weights_N.isfinite()
        return ~(allowed if self._weigher.signed else allowed & (weights_N >= 0))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.skipped = kept["attributes"]["skipped"]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        seen, self._seen = self._seen, []
        each = [
            torch.stack([(w != 0).any(), self._forbidden(w).any(), ~loss.isfinite()])
            for loss, w, _ in seen
        ]
        norm = torch.as_tensor(self._norm, device=args.device)
        broken = ~norm.isfinite() & (not self.scales_loss)
        flags = torch.cat([torch.stack(each).any(0), broken[None]]).int()
        flags = torch.cat([flags, flags.new_tensor([self._received()])])
        if args.world_size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        weighted, forbidden, lost, broken, self.ended_by = flags.tolist()
        step = state.global_step + 1
        if forbidden:
            raise PriftError(
                f"step {step}: {self._name(seen)}. Nothing was learnt from it. "
                + _left(args.output_dir)
            )
        if lost or broken:
            bad = next((x for x, *_ in seen if not x.isfinite()), norm)
            raise ModelError(
                f"the {'loss' if lost else 'gradient norm'} is {_word(float(bad))} at step {step}, "
                "which was not taken. Start anew with a lower --learning_rate (a resumed run keeps "
                "its own), or in another --dtype; if the pretrained model itself answers with NaN, "
                f"`prift precompute` names the example. {_left(args.output_dir)}"
            )
        if not (weighted or self._anchored):
            self.skipped += 1
            model.zero_grad()  # every optimiser passes over a parameter that has no gradient

    def _name(self, seen: list[tuple[Tensor, Tensor, Callable[[int], str]]]) -> str:
        name = self._weigher.name
        wanted = "finite" if self._weigher.signed else "finite, 0 or more"
        for _, weights_N, where in seen:
            for n in self._forbidden(weights_N).nonzero()[:1, 0].tolist():
                return f"rule {name} weighs {where(n)} {float(weights_N[n])}; wanted {wanted}"
        return f"rule {name} gives another process a weight that is not {wanted}"

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step >= state.max_steps:
            self.ended_by = 0  # the run is at its end anyway
        if self.ended_by:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.ended_by and state.epoch != int(state.epoch):  # cut short, so nothing is due yet
            control.should_evaluate = control.should_save = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        return {"args": {}, "attributes": {"skipped": self.skipped}}


def _word(value: float) -> str:
    return "NaN" if value != value else "infinite" if abs(value) == float("inf") else str(value)


def _left(output: str) -> str:
    """What there is to go back to."""
    last = last_checkpoint(Path(output))
    if last is None:
        return f"There is no checkpoint in {output} yet; `-- --save_steps N` says when one is made."
    return f"The last checkpoint is {last}: --resume goes on from it."
