"""What each rule adds to a training step: `make bench-rules`, and a part of `make bench-gpu`.

Forward and backward of one batch (benchmarks/steps.py), with gradient checkpointing on a GPU. For
each rule and source the ratio to plain weights of 1 (`uniform`), which runs the same rows. From the
prior the weights are known before the step and all above zero here, so that no row is left out:
what is measured is a rule's cost, not what its zeros save. Online the rule is computed inside the
loss from what it needs: the log-probability alone, which is there anyway; the other core
statistics; or the extended ones, which sort whole rows. Rules of sequence or batch scope take two
passes over the output projection.

Rounds are interleaved; each ratio is of the least times: wall time on a GPU, on a CPU the process's
CPU time on one thread, which other processes disturb less. --shapes tiny tries the code.
"""

import argparse
import gc
import time
from collections.abc import Callable

import torch
import transformers as tf
from torch import Tensor, nn

from benchmarks import steps
from benchmarks.gpu import SHAPES
from benchmarks.measure import machine, table, write
from prift.forward import Weighted, install, uninstall
from prift.fused import choose
from prift.heads import Head
from prift.methods import weigher
from prift.stats import EXTENDED
from prift.weigher import RULES, Weigher

SHAPES = SHAPES | {
    "small": steps.SHAPE | {"vocab_size": 151_936},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
             "tie_word_embeddings": True},
}  # fmt: skip
ROWS = {"1.5B": (8, 1024), "7B": (4, 1024), "0.5B": (2, 256), "small": (2, 512), "tiny": (2, 64)}
BASE = ("uniform", None)


def kind_of(method: Weigher) -> str:
    """What it needs of the model in training, in words."""
    needs = set(method.needs)
    if needs & set(EXTENDED):
        return "extended"
    return "core" if needs - {"logprob"} else "logprob" if needs else "nothing"


def cases() -> list[tuple[str, str | None]]:
    """(rule, source) of all that is measured: every rule online, and one from the prior, whose
    step is the same for all."""
    return [BASE, ("prob", "prior"), *((name, "online") for name in RULES if name != "uniform")]


def loss_of(
    method: Weigher, model: nn.Module, batch: dict[str, Tensor], prior: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """A function that runs the forward of a model in which the method is installed."""
    source = method.source
    wanted = {n: prior[n] for n in method.base} if source == "online" else {}
    weighted = Weighted.of(batch["labels"], wanted)
    count = len(weighted.tokens.place)
    if source == "prior":
        generator = torch.Generator().manual_seed(3)
        weighted.weights = (0.1 + torch.rand(count, generator=generator)).to(batch["labels"].device)
    inputs = {n: v for n, v in batch.items() if n != "labels"}
    return lambda: model(**inputs, weighted=weighted)["loss"] / count


def measure(shape: str, device: str, rounds: int) -> list[dict]:
    """Every case in turn, `rounds` times after one uncounted."""
    options = dict(SHAPES[shape]) | {"max_position_embeddings": 4096}
    vocabulary = options.pop("vocab_size")
    model = steps.random_model(vocabulary, "bfloat16", device, **options)
    if device == "cuda":
        model.gradient_checkpointing_enable()
    batch = steps.random_batch(vocabulary, *ROWS[shape], device)
    prior = steps.drawn_prior(batch["labels"])
    best: dict[tuple[str, str | None], float] = {}
    methods = {case: weigher(*case, {}, allow_negative=True) for case in cases()}
    for number in range(rounds + 1):
        for case, method in methods.items():
            install(model, method)
            seconds = _timed(loss_of(method, model, batch, prior), model, device)
            uninstall(model)
            if number:
                best[case] = min(seconds, best.get(case, seconds))
    found = []
    for (name, source), seconds in best.items():
        rule = RULES[name]
        needs = "weights" if source == "prior" else kind_of(methods[name, source])
        found.append(
            {"shape": shape, "rule": name, "source": source, "needs": needs, "scope": rule.scope,
             "seconds": seconds, "ratio": seconds / best[BASE]}
        )  # fmt: skip
    return found


def _timed(loss: Callable[[], Tensor], model: nn.Module, device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    steps.train_once(loss, model)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="*", default=["small", "0.5B"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    tf.logging.set_verbosity_error()
    if options.device == "cpu":
        torch.set_num_threads(1)
    print(machine())
    begin = time.perf_counter()
    head = Head(torch.randn(SHAPES["small"]["vocab_size"], 8, device=options.device))
    choose(head, torch.device(options.device), torch.float32, print)
    print(f"made ready at start in {time.perf_counter() - begin:.1f} s\n")
    found = []
    for shape in options.shapes:
        found += measure(shape, options.device, options.rounds)
        gc.collect()
    table(
        ["shape", "rule", "source", "needs", "scope", "to uniform"],
        [[r["shape"], r["rule"], r["source"] or "", r["needs"], r["scope"], f"{r['ratio']:.3f}"]
         for r in found],
    )  # fmt: skip
    write(options.json, {"machine": machine(), "rows": found})


if __name__ == "__main__":
    main()
