"""A training step on a GPU, prift's against plain SFT and the online reference: `make bench-gpu`.

Random-weight models of Qwen2.5's shapes in bfloat16, with gradient checkpointing, on batches of
full rows, 35 % of the tokens prompt and a quarter of the label tokens weighed zero by prift-mass.
For each way: wall seconds of forward and backward, least of the interleaved rounds, the ratio to
plain SFT, peak memory above the model (its gradients included, and a reference where there is one;
no optimiser), and model FLOP utilisation against the matrix rate measured on the same card. FLOPs
are those plain SFT needs at least: six per weight that a token meets, the body for every token, the
projection for label tokens, and causal attention; neither checkpoints' second forward nor rows
that prift-mass leaves out are counted otherwise, so that utilisations compare like times.

Where another package's kernel of the loss is installed, its time beside prift's own, or why it is
not used, is said first (prift/fused.py); the steps are measured without.

`prift-mass packed` runs the same rows end to end (--packing), where torch has the attention for it:
what it costs, where no padding is saved.

What does not fit in memory is said to, and left out. --device cpu --shapes tiny tries the code
where there is no GPU.
"""

import argparse
import gc
import time
from contextlib import nullcontext

import numpy as np
import torch
import transformers as tf
from torch import nn

from benchmarks import steps
from benchmarks.gpu import SHAPES, matrix_rate
from benchmarks.measure import machine, table, write
from prift.fused import choose
from prift.heads import head_of
from prift.memory import free_memory
from prift.packing import kernel_refusal, laid_end_to_end, varlen_attention

VARIANTS = (*steps.VARIANTS, "prift-mass packed")
ROWS = {"1.5B": 8, "7B": 4, "tiny": 2}
LENGTH = {"1.5B": 1024, "7B": 1024, "tiny": 64}


def flops(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Of one step, as this page's head counts them."""
    embedding, head = (
        m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    body = sum(p.numel() for p in model.parameters()) - embedding.numel()
    body -= 0 if head is embedding else head.numel()
    rows, length = batch["input_ids"].shape
    labels = int((batch["labels"][:, 1:] != -100).sum())
    pairs = rows * length * (length + 1) / 2
    width = model.config.hidden_size * model.config.num_hidden_layers
    return 6.0 * (body * rows * length + head.numel() * labels + 2 * width * pairs)


def end_to_end(batch: dict, prior: dict) -> tuple[dict, dict]:
    """The same rows as one packed row [1, T]: no row begins with a label token."""
    rows, length = batch["input_ids"].shape
    ends, places = laid_end_to_end(np.full(rows, length))
    flat, flat_prior = ({n: v.view(1, -1) for n, v in of.items()} for of in (batch, prior))
    device = batch["labels"].device
    flat["position_ids"] = torch.from_numpy(places)[None].to(device)
    return {
        **flat,
        "cu_seq_lens_q": torch.from_numpy(ends).to(device),
        "max_length_q": length,
    }, flat_prior


class Way:
    """One variant of a step, ready to be taken again and again."""

    def __init__(self, variant: str, model: nn.Module, batch: dict, prior: dict):
        self.variant, self._model = variant, model
        packed = variant.endswith(" packed")
        given = end_to_end(batch, prior) if packed else (batch, prior)
        self._within = (lambda: varlen_attention(model)) if packed else nullcontext
        with self._within():
            self._loss = steps.step(variant.removesuffix(" packed"), model, *given)
        self._cuda = batch["labels"].is_cuda
        self.seconds, self.mib = float("inf"), float("nan")

    def take(self, counted: bool) -> None:
        """One step; the first is not counted, since it compiles."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self._cuda else float("nan")
        begin = time.perf_counter()
        with self._within():
            steps.train_once(self._loss, self._model)
        if self._cuda:
            torch.cuda.synchronize()
        if counted:
            self.seconds = min(self.seconds, time.perf_counter() - begin)
            peak = torch.cuda.max_memory_allocated() if self._cuda else float("nan")
            self.mib = (peak - before) / 2**20


def measure(shape: str, device: str, rounds: int, rate: float) -> list[dict]:
    """Every variant on one shape, in interleaved rounds."""
    options = SHAPES[shape] | {"max_position_embeddings": 4096}
    vocabulary = options.pop("vocab_size")
    model = steps.random_model(vocabulary, "bfloat16", device, **options)
    model.gradient_checkpointing_enable()
    batch = steps.random_batch(vocabulary, ROWS[shape], LENGTH[shape], device)
    prior = steps.drawn_prior(batch["labels"])
    choose(head_of(model), torch.device(device), torch.bfloat16, lambda line: print(shape, line))
    cannot = kernel_refusal(torch.device(device), torch.bfloat16)
    if cannot:
        print(f"{shape}: no packed variant: {cannot}")
    ways = [
        Way(variant, model, batch, prior)
        for variant in VARIANTS
        if not (cannot and variant.endswith(" packed"))
    ]
    for number in range(rounds + 1):
        for way in list(ways):
            try:
                way.take(counted=number > 0)
            except torch.cuda.OutOfMemoryError:
                print(f"{shape} {way.variant}: out of memory")
                model.zero_grad(set_to_none=True)
                ways.remove(way)
    return _rows(shape, ways, model, batch, flops(model, batch) / rate)


def _rows(
    shape: str, ways: list[Way], model: nn.Module, batch: dict, least_seconds: float
) -> list[dict]:
    reference = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    found = [
        {"shape": shape, "variant": way.variant, "tokens": batch["labels"].numel(),
         "seconds": way.seconds, "mfu": least_seconds / way.seconds,
         "peak_mib": way.mib + (reference if way.variant == "online-mass" else 0)}
        for way in ways
    ]  # fmt: skip
    for row in found:
        row["ratio"] = row["seconds"] / found[0]["seconds"]
        row["mib_ratio"] = row["peak_mib"] / found[0]["peak_mib"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="*", default=["1.5B", "7B"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    tf.logging.set_verbosity_error()
    rate = matrix_rate(options.device)
    print(f"{machine()}; bfloat16 matrix rate {rate / 1e12:.0f} TFLOP/s\n")
    found = []
    for shape in options.shapes:
        found += measure(shape, options.device, options.rounds, rate)
        gc.collect()
        free_memory()
    table(
        ["shape", "variant", "tokens/s", "to plain SFT", "MFU", "peak MiB", "MiB to plain SFT"],
        [[r["shape"], r["variant"], f"{r['tokens'] / r['seconds']:,.0f}", f"{r['ratio']:.2f}",
          f"{r['mfu']:.0%}", f"{r['peak_mib']:,.0f}", f"{r['mib_ratio']:.2f}"] for r in found],
    )  # fmt: skip
    write(options.json, {"machine": machine(), "rate": rate, "rows": found})


if __name__ == "__main__":
    main()
