"""The vLLM backend against vLLM itself, and against transformers: `make bench-vllm`.

1. Throughput. One engine; the same prompts, by turns: vLLM's own `prompt_logprobs=1`, which gives
   log-probability and rank, and prift's statistics; then prift through transformers, in this
   process. Ratios are to vLLM's own. Its logits have the same dtype, by a head in float32.
2. Memory. What the processes of an engine take on top of what they held once started, at the
   peak, by --max-num-batched-tokens, on prompts of 2,000 tokens.
3. Numbers (benchmarks/vllm_numbers.py). How far apart the backends are in bfloat16, and what
   quantised priors cost in exactness.

On a CPU, with as many threads as the process has cores. --json FILE writes all numbers.
"""

import argparse
import functools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers as tf

from benchmarks import vllm_numbers
from benchmarks.measure import machine, table, wall, write
from benchmarks.stage import make
from prift.backends.vllm import VLLMScorer
from prift.request import request
from prift.store.spans import positions_of
from prift.text.dataspec import DataSpec
from tests.vllm.scorers import all_positions, scorer

OWN = "vLLM, prompt_logprobs=1"
VOCABULARIES = (151_936, 32_000)
DTYPES = ("float32", "bfloat16")
BATCHED_TOKENS = (256, 512, 1024, 2048)
LONG = 2000  # tokens of a prompt where memory is measured


class Prompts:
    """Token ids, and where statistics are wanted: at every token, and at label tokens."""

    def __init__(self, folder: Path, data: Path):
        examples, _ = DataSpec(data=(str(data),)).load(
            folder, tf.AutoConfig.from_pretrained(folder)
        )
        self.sequences = [e.input_ids for e in examples]
        self.everywhere = all_positions(self.sequences)
        self.labels = [positions_of(s) for s in request(examples).spans]
        self.tokens, self.num_labels = examples.num_tokens, examples.num_labels

    def join(self, length: int) -> None:
        """The same tokens in prompts so long: a prompt's logits are made at once, so far as it is
        batched."""
        ids = np.concatenate(self.sequences)
        self.sequences = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        self.everywhere = all_positions(self.sequences)

    def scored_by(self, one: Any, positions: list[np.ndarray]) -> None:
        for _ in one.score(self.sequences, positions):
            pass

    def own(self, one: VLLMScorer) -> None:
        """vLLM's own answer: its functions as they are, for any K that is not prift's."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=1, flat_logprobs=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in self.sequences]
        one._engine._llm.generate(prompts, params, use_tqdm=False)


def made(folder: Path, vocabulary: int, dtype: str, rows: int) -> tuple[str, Prompts]:
    """(a random Qwen2 of hidden size 256 and six layers, prompts as long as GSM8K's)."""
    make(folder / "model", folder / "data.jsonl", vocabulary, dtype, rows)
    return str(folder / "model"), Prompts(folder / "model", folder / "data.jsonl")


def throughput(rounds: int, vocabulary: int, dtype: str, rows: int) -> list[dict]:
    """Tokens a second of wall time, least of the interleaved rounds, after one uncounted."""
    with tempfile.TemporaryDirectory() as place:
        folder, prompts = made(Path(place), vocabulary, dtype, rows)
        with (
            scorer(folder, backend="vllm", dtype=dtype) as vllm,
            scorer(folder, dtype=dtype, compiled=True) as hf,
        ):
            runs: dict[str, Callable[[], Any]] = {
                OWN: functools.partial(prompts.own, vllm),
                "prift, vllm": functools.partial(prompts.scored_by, vllm, prompts.everywhere),
                "prift, hf": functools.partial(prompts.scored_by, hf, prompts.everywhere),
                "prift, vllm, labels": functools.partial(prompts.scored_by, vllm, prompts.labels),
                "prift, hf, labels": functools.partial(prompts.scored_by, hf, prompts.labels),
            }
            threads = len(os.sched_getaffinity(0))
            wall(runs, 1, threads)  # compiles
            seconds = wall(runs, rounds, threads)
    return [
        {"vocabulary": vocabulary, "dtype": dtype, "variant": name, "tokens": prompts.tokens,
         "labels": prompts.num_labels, "seconds": took, "ratio": seconds[OWN] / took}
        for name, took in seconds.items()
    ]  # fmt: skip


def memory(vocabulary: int, rows: int, dtype: str = "bfloat16") -> list[dict]:
    """Peak MiB above a started engine, of prift's statistics and of vLLM's own answer."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder, prompts = made(Path(place), vocabulary, dtype, rows)
        prompts.join(LONG)
        for batched in BATCHED_TOKENS:
            for name in ("prift, vllm", OWN):
                how = {"dtype": dtype, "max_num_batched_tokens": batched}
                with scorer(folder, backend="vllm", **how) as vllm:
                    ours = functools.partial(prompts.scored_by, vllm, prompts.everywhere)
                    run = ours if name != OWN else functools.partial(prompts.own, vllm)
                    mib = growth(run)
                found.append({"batched_tokens": batched, "vocabulary": vocabulary, "dtype": dtype,
                              "variant": name, "mib": mib})  # fmt: skip
    return found


def growth(run: Callable[[], Any]) -> float:
    """Peak resident MiB that the processes of this one take on top of what they hold."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the high-water mark starts here
    before = [_resident(process.pid, "VmRSS") for process in processes]
    run()
    after = [_resident(process.pid, "VmHWM") for process in processes]
    return sum(max(b - a, 0.0) for a, b in zip(before, after, strict=True))


def _resident(pid: int, name: str) -> float:
    """A memory line of a process's status, in MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines[name].split()[0]) / 1024 if name in lines else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of throughput; 0: none")
    parser.add_argument("--rows", type=int, default=64, help="prompts of throughput and memory")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=list(VOCABULARIES))
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--memory-rows", type=int, default=32, help="prompts of memory; 0: none")
    parser.add_argument("--limit", type=int, default=500, help="rows of numbers; 0: none")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.ERROR)
    print(f"{machine()}, {len(os.sched_getaffinity(0))} cores", flush=True)
    found: dict[str, Any] = {"machine": machine(), "throughput": [], "memory": [], "numbers": []}
    if options.rounds:
        print(f"\nQwen2, hidden size 256, 6 layers, least of {options.rounds} rounds\n")
        for vocabulary in options.vocabulary:
            for dtype in options.dtype:
                found["throughput"] += throughput(options.rounds, vocabulary, dtype, options.rows)
        table(
            ["vocabulary", "dtype", "variant", "tokens", "tokens/s", "ratio"],
            [[f"{r['vocabulary']:,}", r["dtype"], r["variant"], f"{r['tokens']:,}",
              f"{r['tokens'] / r['seconds']:,.0f}", f"{r['ratio']:.2f}"]
             for r in found["throughput"]],
        )  # fmt: skip
    if options.memory_rows:
        print(f"\nMiB above a started engine, bfloat16, prompts of {LONG:,} tokens\n")
        found["memory"] = memory(options.vocabulary[0], options.memory_rows)
        table(
            ["--max-num-batched-tokens", "vocabulary", "variant", "MiB"],
            [[f"{r['batched_tokens']:,}", f"{r['vocabulary']:,}", r["variant"], f"{r['mib']:,.0f}"]
             for r in found["memory"]],
        )  # fmt: skip
    if options.limit:
        print()
        found["numbers"] = vllm_numbers.measure(options.limit)
        print(vllm_numbers.tables(found["numbers"]))
    write(options.json, found)


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    main()
