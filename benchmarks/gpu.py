"""Stage 1 on a GPU: `make bench-gpu`, which runs the tests of the CUDA paths first.

Random-weight models of Qwen2.5's shapes over sequences as long as GSM8K's. For each: tokens a
second, the ratio to the floor (the body and the bare bfloat16 product on the same batches), model
FLOP utilisation against the matrix rate measured on the same card, and peak memory above the
model. FLOPs count two per weight that a token meets: the body for every token, the projection for
label tokens, and causal attention.

`prift-to-cache` adds the writing of the cache: all of `prift precompute` but loading the model and
tokenising. --device cpu --shapes tiny tries the code where there is no GPU.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
import transformers as tf

from benchmarks.measure import machine, table, write
from benchmarks.stage import drawn, on_the_same_batches
from benchmarks.variants import REFERENCES
from prift.backends.hf import HFScorer
from prift.cache import sequence_key
from prift.identity import PriorIdentity
from prift.store.spans import spans_of
from prift.store.versions import STATS_VERSION
from prift.store.writer import CacheWriter

SHAPES = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936,
             "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
           "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 5000,
             "tie_word_embeddings": True},
}  # fmt: skip
SEQUENCES = {"1.5B": 2048, "7B": 512, "tiny": 64}
VARIANTS = ("floor", "prift", "prift-to-cache", *REFERENCES)
_IDENTITY = PriorIdentity(
    "0" * 64, "0" * 64, None, "bfloat16", "float32", "sdpa", None, "hf", STATS_VERSION
)


class Bench:
    """One model and its sequences."""

    def __init__(self, shape: str, device: str):
        self.device, options = device, SHAPES[shape]
        torch.manual_seed(0)
        config = tf.Qwen2Config(max_position_embeddings=4096, **options)
        with torch.device(device):
            model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        rows = drawn(options["vocab_size"], SEQUENCES[shape])
        self.sequences = [np.array(r["input_ids"], np.int32) for r in rows]
        labels = [np.array(r["labels"]) != -100 for r in rows]
        self.spans = [spans_of(mask) for mask in labels]
        self.positions = [np.flatnonzero(mask) for mask in labels]
        self.scorer = HFScorer(model, _IDENTITY, say=print)
        self.tokens = sum(map(len, self.sequences))
        self.labels = sum(map(len, self.positions))
        self.flops = self._flops(model, config)

    def _flops(self, model: torch.nn.Module, config: tf.Qwen2Config) -> float:
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        tied = head is embedding
        body = sum(p.numel() for p in model.parameters()) - embedding.numel()
        body -= 0 if tied else head.numel()
        pairs = sum(len(s) * (len(s) + 1) / 2 for s in self.sequences)
        width = config.hidden_size * config.num_hidden_layers
        return 2.0 * (body * self.tokens + head.numel() * self.labels + 2 * width * pairs)

    def run(self, variant: str) -> None:
        """One pass over all sequences."""
        if variant == "prift":
            for _ in self.scorer.score(self.sequences, self.positions):
                pass
        elif variant == "prift-to-cache":
            with tempfile.TemporaryDirectory() as cache:
                self._to_cache(cache)
        else:
            on_the_same_batches(self.scorer, self.sequences, self.positions, variant, 512)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _to_cache(self, cache: str) -> None:
        with CacheWriter(cache, _IDENTITY, {}) as writer:
            for i, stats in self.scorer.score(self.sequences, self.positions):
                values = {n: getattr(stats, n).numpy() for n in stats.names()}
                ids = self.sequences[i]
                writer.add(sequence_key(ids), len(ids), self.spans[i], values)

    def seconds(self, variant: str) -> tuple[float, float]:
        """(wall seconds, peak MiB above the model) of one pass."""
        before = 0.0
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        self.run(variant)
        took = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() - before if self.device == "cuda" else float("nan")
        return took, peak / 2**20


def matrix_rate(device: str) -> float:
    """FLOP/s of a large bfloat16 matrix product, best of several."""
    size, best = (8192, 0.0) if device == "cuda" else (512, 0.0)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    for _ in range(20):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - begin))
    return best


def measure(shape: str, device: str, rounds: int, rate: float) -> list[dict]:
    """Every variant on one shape, interleaved; the references run once, they are slow."""
    bench = Bench(shape, device)
    bench.run("prift")  # compiles
    best: dict[str, tuple[float, float]] = {}
    for number in range(rounds):
        for variant in VARIANTS:
            if variant in REFERENCES and number:
                continue
            found = bench.seconds(variant)
            best[variant] = min(found, best.get(variant, found))
    return [
        {"shape": shape, "variant": v, "tokens": bench.tokens, "labels": bench.labels,
         "seconds": s, "peak_mib": mib, "ratio": s / best["floor"][0],
         "mfu": bench.flops / s / rate}
        for v, (s, mib) in best.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="*", default=["1.5B", "7B"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    rate = matrix_rate(options.device)
    print(f"{machine()}; bfloat16 matrix rate {rate / 1e12:.0f} TFLOP/s\n")
    found = []
    for shape in options.shapes:
        found += measure(shape, options.device, options.rounds, rate)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    table(
        ["shape", "variant", "tokens/s", "ratio to the floor", "MFU", "peak MiB"],
        [[r["shape"], r["variant"], f"{r['tokens'] / r['seconds']:,.0f}", f"{r['ratio']:.2f}",
          f"{r['mfu']:.0%}", f"{r['peak_mib']:,.0f}"] for r in found],
    )  # fmt: skip
    write(options.json, {"machine": machine(), "rate": rate, "rows": found})


if __name__ == "__main__":
    main()
