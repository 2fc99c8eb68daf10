"""One training step, forward and backward, each way, on the same model and batch, for train.py.

    plain-sft     transformers' own loss over full logits: what Trainer computes
    trl-nll, trl-dft   TRL's default loss and its dft, through SFTTrainer.compute_loss
    online-mass   the authors': a frozen reference in memory, scored on every batch (peers.py)
    sft, dft, prift-prob, prift-mass   prift's weighted loss inside the model's forward

All divide by the batch's label tokens, and all train the very same parameters.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from benchmarks.measure import growth
from benchmarks.peers import TRL, frozen, online_loss, shell, trl_trainer
from benchmarks.stage import SHAPE
from prift.chunk import sums_for
from prift.forward import Weighted, install
from prift.methods import METHODS, weigher
from prift.stats import token_stats

VARIANTS = ("plain-sft", *TRL, "online-mass", *METHODS)
PROMPT = 0.35  # share of prompt tokens
ZERO = 0.25  # share of label tokens that prift-mass weighs zero


def random_model(
    vocabulary: int, dtype: str, device: str = "cpu", **shape: Any
) -> tf.Qwen2ForCausalLM:
    """A Qwen2 of random weights in training mode, of hidden size 256 and six layers by default."""
    torch.manual_seed(0)
    config = tf.Qwen2Config(vocab_size=vocabulary, **SHAPE | shape)
    with torch.device(device):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.train()


def random_batch(
    vocabulary: int, rows: int = 2, length: int = 512, device: str = "cpu"
) -> dict[str, Tensor]:
    """Full rows [rows, length], the first 35 % of each a prompt; label tokens a multiple of 4."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : round(PROMPT * length / 4) * 4] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: values.to(device) for name, values in batch.items()}


def drawn_prior(labels_BT: Tensor) -> dict[str, Tensor]:
    """Statistics [B, T] of which exactly a quarter of the label tokens get no weight by mass."""
    generator = torch.Generator().manual_seed(2)
    labelled = (labels_BT != -100).cpu()
    count = int(labelled.sum())
    dropped = torch.randperm(count, generator=generator) < round(ZERO * count)
    logprob = -3 * torch.rand(count, generator=generator)
    values = {
        "logprob": logprob,
        "log_mass_rank": torch.where(dropped, 0.1, 0.9).log(),
        "n_tie": torch.ones(count, dtype=torch.int32),
    }
    found = {}
    for name, flat in values.items():
        full = torch.zeros(labelled.shape, dtype=flat.dtype)
        full[labelled] = flat
        found[name] = full.to(labels_BT.device)
    return found


@torch.no_grad()
def prior_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model itself thinks of the label tokens, [B, T]: small models only."""
    labels = batch["labels"]
    row, column = (labels != -100).nonzero(as_tuple=True)
    logits = model(input_ids=batch["input_ids"]).logits.float()[row, column - 1]
    stats = token_stats(logits, labels[row, column], ("logprob", "log_mass_rank", "n_tie"))
    found = {}
    for name in stats.names():
        flat = getattr(stats, name)
        found[name] = torch.zeros(labels.shape, dtype=flat.dtype).index_put_((row, column), flat)
    return found


def step(
    variant: str, model: nn.Module, batch: dict[str, Tensor], prior: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """A function that gives the variant's loss of the batch, differentiable, each time called."""
    model, labels = shell(model), batch["labels"]
    count = int((labels[:, 1:] != -100).sum())
    if variant == "plain-sft":
        return lambda: model(**batch, num_items_in_batch=count).loss
    if variant == "online-mass":
        reference = frozen(model)
        return lambda: online_loss(model, reference, batch, count)
    if variant in TRL:
        return _trl(variant, model, batch, count)
    method = weigher(*METHODS[variant], {})
    install(model, method)
    needed = {name: prior[name] for name in method.needs} if method.source == "prior" else {}
    weighted = Weighted.of(labels, needed)
    inputs = {n: v for n, v in batch.items() if n != "labels"}
    return lambda: model(**inputs, weighted=weighted)["loss"] / count


def _trl(
    variant: str, model: nn.Module, batch: dict[str, Tensor], count: int
) -> Callable[[], Tensor]:
    folder = tempfile.TemporaryDirectory()
    arguments = {
        "output_dir": folder.name, "report_to": "none",
        "use_cpu": batch["labels"].device.type == "cpu",
    }  # fmt: skip
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    trainer = trl_trainer(variant, model, rows, arguments)

    def loss() -> Tensor:
        return trainer.compute_loss(model, dict(batch), num_items_in_batch=count)

    loss.folder = folder  # kept as long as the trainer is
    return loss


def train_once(loss: Callable[[], Tensor], model: nn.Module) -> None:
    """The step: forward, backward, and the gradients dropped."""
    loss().backward()
    model.zero_grad(set_to_none=True)


def case(
    vocabulary: int, dtype: str, rows: int = 2, length: int = 512, **shape: Any
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """(model, batch, prior), the same each time."""
    batch = random_batch(vocabulary, rows, length)
    return random_model(vocabulary, dtype, **shape), batch, drawn_prior(batch["labels"])


def compile_for(variant: str, vocabulary: int) -> None:
    """What `prift train` compiles at start."""
    if variant in METHODS:
        sums_for(vocabulary)


def memory(variant: str, vocabulary: int, dtype: str) -> float:
    """Peak MiB of one step above the trained model: its gradients included, and a reference. What
    prift compiles at start is left out."""
    setup = (
        "from benchmarks import steps\n"
        f"small = steps.case(4096, {dtype!r}, length=16)\n"
        f"steps.train_once(steps.step({variant!r}, *small), small[0])  # loads what is loaded\n"
        f"steps.compile_for({variant!r}, {vocabulary})\n"
        f"given = steps.case({vocabulary}, {dtype!r})\n"
    )
    return growth(setup, f"steps.train_once(steps.step({variant!r}, *given), given[0])")
