"""Command 2: examples + cache -> Trainer. Loads one model, the one it trains.

What the prior thought comes from the cache alone: this module may not import prift.backends.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from prift.dataset import collate
from prift.errors import OptionError
from prift.forward import install
from prift.lora import base_of, with_lora
from prift.models import (
    attention_for,
    checkpoint_dtype,
    load_config,
    load_model,
    locate,
    weight_files,
)
from prift.output import check_same_run, checkpoint_of, write_options, writing
from prift.ranks import from_rank_zero, is_rank_zero
from prift.trainer import PriftTrainer
from prift.training_data import TrainOptions, load_data
from prift.watch import LastStepLogged, StopAtNan


@dataclass(frozen=True)
class Trained:
    """Where the model is, the optimiser steps, the seconds, and each metric as last logged."""

    output: str
    steps: int
    seconds: float
    metrics: dict[str, float]


def train(
    options: TrainOptions,
    training: Any,
    resolved: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Trained:
    """Fine-tunes a model with token weights; writes an ordinary Hugging Face checkpoint.

    training  transformers.TrainingArguments, from `prift.arguments.training_arguments`
    resolved  options to write to <output>/prift.yaml, a valid --config
    Raises OptionError, DataError, ModelError and CacheError, before anything is trained;
    PriftError where the output cannot be written, ModelError where the loss becomes NaN.
    """
    checkpoint = from_rank_zero(lambda: checkpoint_of(Path(options.output), options.resume))
    if options.resume:
        check_same_run(options.output, resolved or {})
    _check_devices(training, say)
    folder = locate(options.model, trust_remote_code=options.trust_remote_code)
    config = load_config(folder, options.trust_remote_code)
    weight_files(folder)  # refuses a folder without them before the data are read
    datasets, tokenizer = load_data(options, folder, config, say)
    transformers.set_seed(training.seed)  # an adapter's first values are drawn before Trainer seeds
    model = load_model(
        folder,
        config,
        dtype=checkpoint_dtype(folder, config) if options.dtype == "auto" else options.dtype,
        attention=attention_for(config, options.attention),
        trust_remote_code=options.trust_remote_code,
    )
    if options.lora_r:
        model = with_lora(
            model, options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target
        )
    install(base_of(model), options.weigher)
    with writing(options.output):
        trainer = PriftTrainer(
            model=model,
            args=training,
            data_collator=collate,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=tokenizer,
            callbacks=[LastStepLogged(), StopAtNan()],
            full_metrics_steps=options.full_metrics_steps,
            skips_rows=options.weigher.source == "prior",
        )
        write_options(options.output, resolved or {})
        result = trainer.train(resume_from_checkpoint=checkpoint)
        _save(trainer, options)
    return Trained(
        output=options.output,
        steps=result.global_step,
        seconds=result.metrics["train_runtime"],
        metrics=_last_metrics(trainer.state.log_history),
    )


def _check_devices(training: Any, say: Callable[[str], None]) -> None:
    """One process drives one device, and processes started together must train together."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != training.world_size:
        raise OptionError(
            f"{started} processes were started, but they do not form one run of data parallel "
            f"training (world size {training.world_size})."
        )
    if training.n_gpu > 1:
        say(
            f"using one of {training.n_gpu} GPUs; for all of them: torchrun --nproc-per-node "
            f"{training.n_gpu} -m prift train ..."
        )
        training._n_gpu = 1  # or Trainer would split batches over GPUs inside this process


def _save(trainer: PriftTrainer, options: TrainOptions) -> None:
    """The final model, or the adapter, with its tokenizer, in the output folder."""
    if options.merge:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        if is_rank_zero():
            merged.save_pretrained(options.output)
            trainer.processing_class.save_pretrained(options.output)
    else:
        trainer.save_model(options.output)
    trainer.save_state()
    if is_rank_zero():  # a pickle; prift.yaml says the same, and can be read without running it
        (Path(options.output) / "training_args.bin").unlink(missing_ok=True)


def _last_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    return {k: v for entry in history for k, v in entry.items() if isinstance(v, (int, float))}
