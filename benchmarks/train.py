"""What a training step costs, prift's against its peers: `make bench-train`.

Two tables for each vocabulary and dtype; ratios are to plain Trainer SFT.

1. One step, forward and backward, of a random Qwen2 (hidden size 256, six layers, tied) on 2 x 512
   tokens, 35 % of them prompt, a quarter of the label tokens weighed zero by prift-mass. Weights
   in the dtype named. Process CPU time on one thread, least of interleaved rounds; the wall time
   of two threads beside it; peak memory above the model, its gradients included, in a process of
   its own (benchmarks/steps.py says what is compared).
2. Some steps of each Trainer over rows as long as GSM8K's, batches and padding as each makes them
   (benchmarks/trainers.py): tokens of real data a second, tokens run per real token, peak memory
   above the model with the optimiser's state, in a process of its own.

TRL's rows are left out where it is not installed. --json FILE writes all numbers.
"""

import argparse
import functools

import torch
import transformers as tf

from benchmarks import steps, trainers
from benchmarks.measure import interleaved, machine, table, wall, write
from benchmarks.peers import TRL
from prift.methods import METHODS

VOCABULARIES = (151_936, 32_000)
DTYPES = ("float32", "bfloat16")


def step_rows(vocabulary: int, dtype: str, rounds: int, threads: int = 2) -> list[dict]:
    """The first table of one vocabulary and dtype."""
    given = steps.case(vocabulary, dtype)
    runs = {
        variant: functools.partial(steps.train_once, steps.step(variant, *given), given[0])
        for variant in steps.VARIANTS
    }
    seconds, walls = interleaved(runs, rounds), wall(runs, 3, threads)
    runs.clear()
    del given
    mib = {variant: steps.memory(variant, vocabulary, dtype) for variant in steps.VARIANTS}
    return [
        {"vocabulary": vocabulary, "dtype": dtype, "variant": variant,
         "seconds": seconds[variant], "wall2": walls[variant], "mib": mib[variant]}
        for variant in steps.VARIANTS
    ]  # fmt: skip


def trainer_rows(vocabulary: int, dtype: str, count: int, rounds: int) -> list[dict]:
    """The second table of one vocabulary and dtype, of `count` steps each."""
    found = trainers.best(vocabulary, dtype, count, rounds)
    return [
        {"vocabulary": vocabulary, "dtype": dtype, "variant": variant, **values}
        for variant, values in found.items()
    ]


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds each value's ratio to plain SFT's, and the time's to the online reference's."""
    by_name = {row["variant"]: row for row in rows}
    plain, online = by_name["plain-sft"], by_name["online-mass"]

    def each(row: dict) -> float:
        return row["seconds"] / row.get("tokens", 1)  # whole trainers do not see the same tokens

    for row in rows:
        row |= {
            "ratio": each(row) / each(plain),
            "to_online": each(row) / each(online),
            "mib_ratio": row["mib"] / plain["mib"],
        }
        if "wall2" in row:
            row["ratio2"] = row["wall2"] / plain["wall2"]
    return rows


def show_steps(rows: list[dict]) -> None:
    table(
        ["vocabulary", "dtype", "variant", "seconds", "to plain SFT", "to the online reference",
         "to plain SFT, 2 threads, wall", "MiB", "MiB to plain SFT"],
        [[f"{r['vocabulary']:,}", r["dtype"], r["variant"], f"{r['seconds']:.2f}",
          f"{r['ratio']:.2f}", f"{r['to_online']:.2f}", f"{r['ratio2']:.2f}", f"{r['mib']:,.0f}",
          f"{r['mib_ratio']:.2f}"] for r in rows],
    )  # fmt: skip


def show_trainers(rows: list[dict]) -> None:
    table(
        ["vocabulary", "dtype", "variant", "tokens run per real token", "real tokens/s",
         "to plain SFT", "to the online reference", "MiB", "MiB to plain SFT"],
        [[f"{r['vocabulary']:,}", r["dtype"], r["variant"], f"{r['run'] / r['tokens']:.2f}",
          f"{r['tokens'] / r['seconds']:,.0f}", f"{r['ratio']:.2f}", f"{r['to_online']:.2f}",
          f"{r['mib']:,.0f}", f"{r['mib_ratio']:.2f}"] for r in rows],
    )  # fmt: skip


def goals(rows: list[dict]) -> list[dict]:
    """What prift's steps are to reach, and what they do reach; dicts of a goal and its numbers."""
    found = []
    for vocabulary, dtype in {(r["vocabulary"], r["dtype"]): None for r in rows}:
        of = {r["variant"]: r for r in rows if (r["vocabulary"], r["dtype"]) == (vocabulary, dtype)}
        large = vocabulary >= 100_000
        bounds = [("prift-mass", "to_online", 0.40)] if large else []
        if large:
            bounds += [("prift-mass", "ratio", 0.70 if dtype == "float32" else 0.60)]
            bounds += [(v, "ratio", 0.80) for v in ("prift-prob", "dft")]
            bounds += [(v, "mib_ratio", 0.40) for v in METHODS]
        if TRL:
            best = min(of[v]["ratio"] for v in TRL)
            bounds += [(v, "ratio", best) for v in METHODS]
        found += [
            {"vocabulary": vocabulary, "dtype": dtype, "variant": variant, "what": what,
             "bound": bound, "found": of[variant][what]}
            for variant, what, bound in bounds
        ]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of the steps; 0: no steps")
    parser.add_argument(
        "--trainer-rounds", type=int, default=1, help="of the whole trainers; 0: no trainers"
    )
    parser.add_argument("--vocabulary", type=int, nargs="*", default=list(VOCABULARIES))
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--steps", type=int, default=12, help="of each whole trainer")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    print(machine(), flush=True)
    if not TRL:
        print("TRL is not installed (pip install -e '.[bench]'): its rows are left out.")
    cases = [(v, d) for v in options.vocabulary for d in options.dtype]
    found: dict[str, list[dict]] = {"steps": [], "trainers": []}
    if options.rounds:
        print(f"\nOne step of 2 x 512 tokens, least of {options.rounds} rounds")
        for case in cases:
            print()
            found["steps"] += with_ratios(step_rows(*case, options.rounds))
            show_steps(found["steps"][-len(steps.VARIANTS) :])
    found["goals"] = goals(found["steps"])
    for goal in found["goals"]:
        if goal["found"] > goal["bound"]:
            print("\nmissed: {vocabulary:,} {dtype} {variant} {what} {found:.2f} over {bound:.2f}"
                  .format(**goal), end="")  # fmt: skip
    print()
    if options.trainer_rounds:
        print(f"\nWhole trainers, {options.steps} steps, batches of {trainers.BATCH}")
        for case in cases:
            print()
            rows = trainer_rows(*case, options.steps, options.trainer_rounds)
            found["trainers"] += with_ratios(rows)
            show_trainers(rows)
    write(options.json, {"machine": machine(), **found})


if __name__ == "__main__":
    main()
