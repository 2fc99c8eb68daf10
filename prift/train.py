"""Command 2: examples + cache -> Trainer. Loads one model, the one it trains.

What the prior thought comes from the cache alone: this module may not import prift.backends.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from prift.cache import PriorCache
from prift.dataset import PriorDataset, collate
from prift.dataspec import DataSpec
from prift.errors import CacheError, OptionError
from prift.forward import install
from prift.identity import config_digest, weights_digest
from prift.lora import base_of, with_lora
from prift.models import (
    attention_for,
    checkpoint_dtype,
    load_config,
    load_model,
    locate,
    weight_files,
)
from prift.output import checkpoint_of, write_options, writing
from prift.ranks import from_rank_zero, is_rank_zero
from prift.request import choose_prior, read_prior
from prift.rules import Weigher
from prift.trainer import PriftTrainer
from prift.watch import LastStepLogged, StopAtNan


@dataclass(frozen=True)
class TrainOptions:
    """What is trained, from what, into what. See `prift train --help`."""

    model: str
    output: str
    spec: DataSpec
    weigher: Weigher
    cache: str | None = None
    prior: str | None = None
    eval_data: tuple[str, ...] = ()
    dtype: str = "float32"
    attention: str = "auto"
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_target: str = "all-linear"
    merge: bool = False
    resume: bool = False
    full_metrics_steps: int | None = None
    trust_remote_code: bool = False


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
    folder = locate(options.model)
    config = load_config(folder, options.trust_remote_code)
    weight_files(folder)  # refuses a folder without them before the data are read
    datasets, tokenizer = _datasets(options, folder, config, say)
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


def _datasets(
    options: TrainOptions, folder: Path, config: Any, say: Callable[[str], None]
) -> tuple[tuple[PriorDataset, PriorDataset | None], Any]:
    """((training data, evaluation data or None), tokenizer), the prior's statistics beside them."""
    cache = _open_cache(options, folder, config, say)
    specs = [("training", options.spec)]
    if options.eval_data:
        text = replace(options.spec.text, limit=None)
        specs.append(
            ("evaluation", replace(options.spec, data=options.eval_data, weights=(), text=text))
        )
    found, tokenizer = [], None
    for purpose, spec in specs:
        examples, tokenizer = spec.load(folder, config)
        for line in examples.report.lines():
            say(f"{purpose}: {line}")
        prior = {}
        if cache is not None:
            names = sorted({"logprob", *options.weigher.rule.needs})
            command = _command(options, spec)
            try:
                prior = read_prior(cache, examples, names, command)
            except CacheError as error:
                if options.weigher.source == "prior":
                    raise
                say(f"{purpose}: drift is not measured: {error}")
        found.append(PriorDataset(examples, prior))
    return (found[0], found[1] if len(found) > 1 else None), tokenizer


def _open_cache(
    options: TrainOptions, folder: Path, config: Any, say: Callable[[str], None]
) -> PriorCache | None:
    """The cache of the prior to read; None where none is needed and none was named."""
    needed = options.weigher.source == "prior"
    if options.cache is None:
        if needed:
            raise OptionError(
                f"rule {options.weigher.rule.name} with --source prior reads the prior's "
                f"statistics: give --cache. Made by:\n  {_command(options, options.spec)}"
            )
        return None
    by_id = bool(re.fullmatch("[0-9a-f]{8,64}", options.prior or ""))
    by_id = by_id and not Path(options.prior or "").exists()
    try:
        weights, digest = "", ""
        if not by_id:
            other = locate(options.prior, "--prior") if options.prior else folder
            its_config = load_config(other, options.trust_remote_code) if options.prior else config
            weights = from_rank_zero(lambda: weights_digest(weight_files(other)))
            digest = config_digest(its_config)
        identity = choose_prior(
            options.cache,
            weights,
            digest,
            options.prior if by_id else None,
            _command(options, options.spec),
        )
    except CacheError as error:
        if needed:
            raise
        say(f"drift is not measured: {error}")
        return None
    say(f"prior {identity.id} ({identity.dtype}, {identity.backend})")
    return PriorCache(options.cache, identity)


def _command(options: TrainOptions, spec: DataSpec) -> str:
    prior = options.prior if options.prior and Path(options.prior).exists() else options.model
    return spec.precompute_command(prior, options.cache or "CACHE")


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
