"""What statistics cost on top of the output projection: `make bench-score`.

Two tables, each from interleaved runs, ratios to the floor of the same dtype:

1. Projection and statistics alone: hidden states of 512 label rows, hidden size 896, and a random
   projection. The floor is the bare matrix product (benchmarks/variants.py says what is compared).
2. The whole of stage 1: a random Qwen2 of hidden size 256 and six layers over GSM8K-like rows,
   batches as prift cuts them. The floor is the body plus the bare product on the same batches;
   `precompute` is the whole command's work: loading, tokenising, scoring, writing.

One thread, process CPU time, least of the rounds; two-thread wall time beside it. Memory is the
peak above the operands, in a process of its own. --json FILE writes all numbers.
"""

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import growth, interleaved, machine, table, wall, write
from benchmarks.stage import Stage
from benchmarks.variants import VARIANTS, once, runner

ROWS, HIDDEN = 512, 896
VOCABULARIES = (151_936, 32_000)
DTYPES = ("float32", "bfloat16")


def operands(
    vocabulary: int, dtype: str, rows: int = ROWS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states, projection and targets; half of the targets are likely ones."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, HIDDEN).to(getattr(torch, dtype))
    weight = (torch.randn(vocabulary, HIDDEN) * 0.1).to(hidden.dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    half = rows // 2
    targets[:half] = torch.cat([(h @ weight.T).argmax(1) for h in hidden[:half].split(64)])
    return hidden, weight, targets


def memory(variant: str, vocabulary: int, dtype: str) -> float:
    """MiB above the operands."""
    setup = (
        "from benchmarks.score import operands; from benchmarks.variants import runner\n"
        f"given = operands({vocabulary}, {dtype!r})\n"
        f"small = [given[0][:2], given[1][:4096], given[2][:2] % 4096]\n"
        f"runner({variant!r}, *small)()  # builds and loads what is built\n"
        "from benchmarks import variants; variants.BLOCKS, variants.TILES = (8,), (4096,)\n"
    )
    return growth(setup, f"runner({variant!r}, *given)()")


def projection(
    rounds: int,
    vocabularies: tuple[int, ...],
    dtypes: Sequence[str] = DTYPES,
    variants: Sequence[str] = VARIANTS,
) -> list[dict]:
    """The first table."""
    found, lines = [], []
    for vocabulary in vocabularies:
        for dtype in dtypes:
            given = operands(vocabulary, dtype)
            runs = {v: runner(v, *given) for v in variants}
            seconds, walls = interleaved(runs, rounds), wall(runs, 2, 2)
            mib = {v: memory(v, vocabulary, dtype) for v in variants}
            for name in variants:
                found.append({"vocabulary": vocabulary, "dtype": dtype, "variant": name,
                              "seconds": seconds[name], "wall2": walls[name], "mib": mib[name],
                              "ratio": seconds[name] / seconds["projection"]})  # fmt: skip
                lines.append([f"{vocabulary:,}", dtype, name, f"{ROWS / seconds[name]:,.0f}",
                              f"{seconds[name] / seconds['projection']:.2f}",
                              f"{walls[name] / walls['projection']:.2f}",
                              f"{mib[name]:,.0f}"])  # fmt: skip
    head = ["vocabulary", "dtype", "variant", "rows/s", "ratio, 1 thread", "ratio, 2 threads, wall"]
    table([*head, "MiB"], lines)
    return found


def stage(
    rounds: int,
    vocabularies: tuple[int, ...],
    rows: int,
    dtypes: Sequence[str] = DTYPES,
    variants: Sequence[str] = VARIANTS,
) -> list[dict]:
    """The second table. The references, many times slower, run once, and without their memory."""
    found, lines = [], []
    for vocabulary in vocabularies:
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                whole = Stage(Path(folder), vocabulary, dtype, rows)
                chosen = [v for v in Stage.VARIANTS if v in Stage.MAIN or v in variants]
                runs = {name: functools.partial(whole.run, name) for name in chosen}
                main = {name: runs.pop(name) for name in Stage.MAIN}
                seconds = interleaved(main, rounds)
                seconds |= {name: once(run) for name, run in runs.items()}
                mib = {name: whole.memory(name) for name in ("floor", "prift")}
            for name in chosen:
                ratio = seconds[name] / seconds["floor"]
                found.append({"vocabulary": vocabulary, "dtype": dtype, "variant": name,
                              "tokens": whole.tokens, "labels": whole.labels, "ratio": ratio,
                              "seconds": seconds[name], "mib": mib.get(name)})  # fmt: skip
                lines.append([f"{vocabulary:,}", dtype, name, f"{whole.tokens:,}",
                              f"{whole.tokens / seconds[name]:,.0f}", f"{ratio:.2f}",
                              f"{mib[name]:,.0f}" if name in mib else ""])  # fmt: skip
    table(["vocabulary", "dtype", "variant", "tokens", "tokens/s", "ratio", "MiB"], lines)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of the first table; 0: none")
    parser.add_argument("--stage-rounds", type=int, default=7, help="of the second; 0: none")
    parser.add_argument("--variant", nargs="*", default=list(VARIANTS), choices=VARIANTS,
                        help="floors, and prift in the second table, are always there")  # fmt: skip
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--vocabulary", type=int, nargs="*", default=list(VOCABULARIES))
    parser.add_argument("--rows", type=int, default=32, help="data rows of the second table")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    vocabularies = tuple(options.vocabulary)
    variants = [v for v in VARIANTS if v == "projection" or v in options.variant]
    first, second = [], []
    if options.rounds:
        print(f"\n{ROWS} rows, hidden size {HIDDEN}, least of {options.rounds} rounds\n")
        first = projection(options.rounds, vocabularies, options.dtype, variants)
    if options.stage_rounds:
        print(f"\nQwen2, hidden size 256, 6 layers, least of {options.stage_rounds} rounds\n")
        rows, rounds = options.rows, options.stage_rounds
        second = stage(rounds, vocabularies, rows, options.dtype, options.variant)
    write(options.json, {"machine": machine(), "projection": first, "stage": second})


if __name__ == "__main__":
    main()
