"""Whole trainers over rows as long as GSM8K's, each with the batches it would make, for train.py.

    plain-sft, online-mass   transformers.Trainer: random batches, padded to their longest; the
                             authors' data set pads every example to a fixed length instead
    trl-nll, trl-dft         TRL's SFTTrainer with its own collator: random batches as well
    sft, dft, prift-*        PriftTrainer as `prift train` sets it up: batches of like lengths

Some steps each, AdamW, no gradient checkpointing, float32 weights; bfloat16 means autocast
(`--bf16 true`), and a reference held in bfloat16. The authors pad to 2048 tokens; so much padding
would measure nothing else, so theirs is padded to `FIXED` here. The data are four times what is
run: transformers sorts by length within a quarter of them at most, and so a run of prift is one
such quarter, long and short rows alike.
"""

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers as tf
from torch import Tensor

from benchmarks.measure import apart
from benchmarks.peers import TRL, OnlineTrainer, Padded, shell, trl_trainer
from benchmarks.stage import drawn
from benchmarks.steps import VARIANTS, drawn_prior, random_model
from prift.arguments import training_arguments
from prift.dataset import PriorDataset, collate
from prift.forward import install
from prift.methods import METHODS, weigher
from prift.text.examples import Examples, TextOptions, load_examples
from prift.trainer import PriftTrainer
from prift.watch import StepGuard
from prift.weighing import weigh
from tests.toy_tokenizers import byte_level

FIXED = 512  # tokens to which the authors' examples are padded here
BATCH = 4  # examples of a batch


class Whole:
    """Some steps of one variant's Trainer, on a random model.

    tokens   of the examples that were trained on, whole and without padding
    run      tokens that went through the model in training, padding included
    seconds, wall   process CPU and wall time of `Trainer.train`
    """

    def __init__(self, variant: str, vocabulary: int, dtype: str, steps: int, **shape: Any):
        self._variant, self._dtype, self._steps = variant, dtype, steps
        self._model = shell(random_model(vocabulary, "float32", **shape))
        self._rows = drawn(vocabulary, 4 * BATCH * steps)
        self._lengths = [len(row["input_ids"]) for row in self._rows]
        self._collated: deque[int] = deque()  # tokens of batches that were made and not run yet
        self.tokens, self.run, self.seconds, self.wall = 0, 0, 0.0, 0.0
        self._model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, arguments: tuple[Tensor]) -> None:
        if self._collated:  # else the model is looked at before training
            self.tokens += self._collated.popleft()
            self.run += arguments[0].numel()

    def _counting(self, collator: Callable[[list[dict]], dict]) -> Callable[[list[dict]], dict]:
        """The collator, which also notes how many tokens its batches have."""

        def collated(items: list[dict]) -> dict:
            self._collated.append(
                sum(
                    self._lengths[item["index"]] if "index" in item else len(item["input_ids"])
                    for item in items
                )
            )
            return collator(items)

        return collated

    def train(self, folder: str | None = None) -> "Whole":
        """Makes the Trainer and lets it train."""
        with tempfile.TemporaryDirectory(dir=folder) as output:
            trainer = self._trainer(output)
            trainer.data_collator = self._counting(trainer.data_collator)
            cpu, wall = time.process_time(), time.perf_counter()
            trainer.train()
            self.seconds = time.process_time() - cpu
            self.wall = time.perf_counter() - wall
        return self

    def _trainer(self, output: str) -> tf.Trainer:
        half = self._dtype == "bfloat16"
        common = {
            "per_device_train_batch_size": BATCH, "max_steps": self._steps, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": half,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        if self._variant in METHODS:
            flags = [f"--{name}={value}" for name, value in common.items()]
            return self._ours(output, flags)
        common |= {"output_dir": output}
        if self._variant in TRL:
            return trl_trainer(self._variant, self._model, self._rows, common)
        given = {
            "model": self._model,
            "args": tf.TrainingArguments(**common),
            "train_dataset": datasets.Dataset.from_list(self._rows),
        }
        if self._variant == "plain-sft":
            return tf.Trainer(**given, data_collator=Padded())
        dtype = torch.bfloat16 if half else torch.float32
        return OnlineTrainer(**given, data_collator=Padded(FIXED), reference_dtype=dtype)

    def _ours(self, output: str, flags: list[str]) -> PriftTrainer:
        """As prift.train.train sets it up; the prior is drawn, a quarter of it weighs zero."""
        method = weigher(*METHODS[self._variant], {})
        data = Path(output) / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        examples = load_examples([str(data)], byte_level(), TextOptions(), context=None)
        knows = method.source == "prior"  # the weights, before training
        prior = _prior(examples, {"logprob", *method.needs}) if knows else {}
        if knows:
            prior["weights"] = weigh(method, examples.label_counts, prior)
        install(self._model, method)
        return PriftTrainer(
            model=self._model,
            args=training_arguments(output, {}, flags, False)[0],
            data_collator=collate,
            train_dataset=PriorDataset(examples, prior, cut=knows),
            guard=StepGuard(method),
            skips_rows=knows,
        )


def _prior(examples: Examples, names: set[str]) -> dict[str, np.ndarray]:
    """Statistics flat over all label tokens of all examples."""
    labelled = np.concatenate([example.label_mask for example in examples])
    labels = torch.where(torch.tensor(labelled), 0, -100)[None]
    prior = drawn_prior(labels)
    return {name: prior[name][labels != -100].numpy() for name in names}


def measured(variant: str, vocabulary: int, dtype: str, steps: int) -> dict[str, float]:
    """So many steps in a process of its own; mib: the peak above the model, with the optimiser.
    What prift compiles at start is left out."""
    setup = (
        "from benchmarks.steps import compile_for\n"
        "from benchmarks.trainers import Whole\n"
        f"Whole({variant!r}, 512, {dtype!r}, 1, hidden_size=64).train()  # loads what is loaded\n"
        f"compile_for({variant!r}, {vocabulary})\n"
        f"whole = Whole({variant!r}, {vocabulary}, {dtype!r}, {steps})\n"
    )
    answer = "[whole.tokens, whole.run, whole.seconds, whole.wall]"
    mib, found = apart(setup, "whole.train()", answer)
    return dict(zip(("tokens", "run", "seconds", "wall"), found, strict=True)) | {"mib": mib}


def best(vocabulary: int, dtype: str, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Each variant's least of the interleaved rounds, value by value."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for variant in VARIANTS:
            new = measured(variant, vocabulary, dtype, steps)
            old = found.get(variant, new)
            found[variant] = {name: min(new[name], old[name]) for name in new}
    return found
