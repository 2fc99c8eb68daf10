"""What watches a training run from outside: the last step is logged, and NaN ends the run."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prift.errors import ModelError


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


class StopAtNan(TrainerCallback):
    """Raises ModelError once a logged loss is NaN: nothing mends weights that became NaN."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if math.isnan((logs or {}).get("loss", 0.0)):
            raise ModelError(
                f"the loss is NaN at step {state.global_step} or shortly before. Lower "
                "--learning_rate, or train in another --dtype; if the pretrained model itself "
                "answers with NaN, `prift precompute` names the example. Earlier checkpoints in "
                f"{args.output_dir} are kept."
            )
