"""Command 2: examples + cache -> Trainer. Loads one model, the one it trains.

What the prior thought comes from the cache alone: this module may not import prift.backends.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from prift.arguments import is_set
from prift.dataset import collate
from prift.errors import Interrupted, ModelError, OptionError
from prift.forward import install, uninstall
from prift.fused import kernel_for
from prift.identity import quantization_of
from prift.lora import base_of, with_lora
from prift.memory import training_within
from prift.models import (
    attention_for,
    checkpoint_dtype,
    load_config,
    load_model,
    locate,
    weight_files,
)
from prift.normalizers import check_late, is_late
from prift.output import (
    check_same_run,
    checkpoint_of,
    last_checkpoint,
    write_options,
    writing,
)
from prift.packcheck import check_packing
from prift.packing import kernel_refusal, varlen_attention
from prift.ranks import from_each_rank, from_rank_zero, is_rank_zero
from prift.signals import Signals
from prift.stepcheck import check_start
from prift.trainer import PriftTrainer
from prift.training_data import TrainOptions, load_data
from prift.watch import StepGuard

_WRAPPERS = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"  # as accelerate's launcher asks
_ANSWER = "a checkpoint is saved after this step; Ctrl-C ends at once"


@dataclass(frozen=True)
class Trained:
    """Where the model is, the optimiser steps, those of them that had no weight and were skipped,
    the seconds, and each metric as last logged."""

    output: str
    steps: int
    skipped: int
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
    PriftError where the output cannot be written, memory does not suffice or a weight may not be,
    ModelError where the loss becomes NaN or infinite, Interrupted after SIGINT or SIGTERM.
    """
    checkpoint = from_rank_zero(lambda: checkpoint_of(Path(options.output), options.resume))
    if options.resume:
        check_same_run(options.output, resolved or {})
    _check_devices(training, say)
    folder = locate(options.model, trust_remote_code=options.trust_remote_code)
    config = load_config(folder, options.trust_remote_code)
    weight_files(folder)  # refuses a folder without them before the data are read
    _check_numbers(folder, config)
    if is_late(options.normalize, options.weigher.known):
        balanced = bool(getattr(config, "output_router_logits", False))
        check_late(options.normalize, training, balanced, options.anchor is not None)
    dtype = checkpoint_dtype(folder, config) if options.dtype == "auto" else options.dtype
    if options.packing:
        _check_kernel(training, dtype)
    data = load_data(options, folder, config, say)
    transformers.set_seed(training.seed)  # an adapter's first values are drawn before Trainer seeds
    model = load_model(
        folder,
        config,
        dtype=dtype,
        attention=attention_for(config, options.attention),
        trust_remote_code=options.trust_remote_code,
    )
    if options.lora_r:
        model = with_lora(
            model, options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target
        )
    install(base_of(model), options.weigher, kernel_for(base_of(model), training, say))
    signals = Signals(_ANSWER if is_rank_zero() else "")
    guard = StepGuard(options.weigher, lambda: signals.received, bool(options.anchor_weight))
    with writing(options.output), closing(data):
        trainer = PriftTrainer(
            model=model,
            args=training,
            data_collator=partial(collate, packed=options.packing),
            train_dataset=data.training,
            eval_dataset=data.evaluation,
            processing_class=data.tokenizer,
            guard=guard,
            full_metrics_steps=options.full_metrics_steps,
            skips_rows=options.skips_rows,
            anchor=options.anchor_weight,
        )
        check_start(model, data.training, data.prior, options, folder, say)
        if options.packing:
            with trainer.accelerator.autocast():
                from_each_rank(lambda: check_packing(base_of(model)))
        write_options(options.output, resolved or {})
        packing = varlen_attention(model) if options.packing else nullcontext()
        with packing, signals, training_within(*_sizes(options, training), options.output):
            result = trainer.train(resume_from_checkpoint=checkpoint)
            if guard.ended_by:
                raise _interrupted(guard.ended_by, options.output)
            uninstall(base_of(model))
            _save(trainer, options)
    if guard.skipped:
        say(f"{guard.skipped:,} of {result.global_step:,} steps had no weight and were skipped")
    return Trained(
        output=options.output,
        steps=result.global_step,
        skipped=guard.skipped,
        seconds=result.metrics["train_runtime"],
        metrics=_last_metrics(trainer.state.log_history),
    )


def _sizes(options: TrainOptions, training: Any) -> tuple[int, int, list[str]]:
    """(examples of a micro-batch, micro-batches of a step, what else would need less memory)."""
    more = []
    if not training.gradient_checkpointing:
        more.append("compute activations twice: `-- --gradient_checkpointing`")
    if not options.lora_r:
        more.append("train an adapter: `--lora-r 16`")
    if options.skips_rows:
        more.append("run whole sequences for nll and drift less often: `--full-metrics-steps N`")
    if options.eval_data:
        more.append("while evaluating, lower per_device_eval_batch_size")
    return training.per_device_train_batch_size, training.gradient_accumulation_steps, more


def _interrupted(signal: int, output: str) -> Interrupted:
    return Interrupted(
        f"interrupted; saved {last_checkpoint(Path(output))}. The same command with --resume goes "
        "on from it, to the same model.",
        signal,
    )


def _check_numbers(folder: Path, config: Any) -> None:
    """Quantised weights have no gradient, and adapters over them (QLoRA) were never tried."""
    if quantization_of(config) is not None:
        raise ModelError(
            f"{folder} is quantised (quantization_config in its config.json), and prift does not "
            "train quantised models, nor adapters over them (QLoRA). Take the model as it was "
            "before; `--lora-r 16 --dtype bfloat16` trains an adapter in two bytes a parameter."
        )


def _check_kernel(training: Any, dtype: str) -> None:
    """Refuses --packing where torch has no variable-length attention for it."""
    if training.fsdp or training.deepspeed or any(map(is_set, _WRAPPERS)):
        raise OptionError(
            "--packing was never tried with --fsdp and --deepspeed, which put the model on its "
            "device too late to try it. Leave one of them out."
        )
    half = "bfloat16" if training.bf16 else "float16" if training.fp16 else dtype
    reason = kernel_refusal(training.device, getattr(torch, half))
    if reason is not None:
        raise OptionError(
            f"--packing needs torch's variable-length attention, which does not run in {half} on "
            f"this {training.device.type} device ({reason}). It wants a CUDA device and half "
            "precision: `-- --bf16` for mixed precision, or `--dtype bfloat16`. Or leave --packing "
            "out: batches are then padded, and grouped by length so that little is lost."
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
