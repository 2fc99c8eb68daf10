"""What the statistics cost on top of the output projection: `make bench-score`.

In one interleaved run, for hidden states of 512 label rows and a random projection:

    projection   the bare matrix product, whole or in tiles into one buffer, the faster: the floor
    prift        projection and all core statistics, in prift's blocks
    softmax-sort log_softmax, sort and cumsum of the same logits, in its fastest block size
    online-score what PriFT's authors compute per batch from a reference model's logits (softmax,
                 the mass strictly below the target, the target's own), from the paper's formula

One thread, process CPU time, minimum of the rounds; peak memory is what each allocates above the
operands, from the resident set. Prints ratios to the floor; --json FILE writes them.
"""

import argparse
import json
import platform
import subprocess
import sys
import time

import torch

from prift.backends.hf import stats_of_rows
from prift.heads import Head

ROWS, HIDDEN = 512, 896
VARIANTS = ("projection", "prift", "softmax-sort", "online-score")


def run(
    variant: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, block: int
):
    """One pass of a variant over all rows, `block` rows at a time."""
    if variant == "prift":
        return stats_of_rows(hidden, Head(weight), targets, "float32")
    for i in range(0, len(targets), block):
        z = hidden[i : i + block] @ weight.T
        y = targets[i : i + block, None]
        if variant == "softmax-sort":
            ordered = z.float().log_softmax(1).sort(1, descending=True).values
            ordered.exp().cumsum(1)
        elif variant == "online-score":
            q = z.float().softmax(1)
            own = q.gather(1, y)
            _ = torch.where(q < own, q, 0).sum(1) + own[:, 0] >= 0.5
    return None


def fastest_block(variant: str, *operands: torch.Tensor) -> int:
    """The block size in which the variant is fastest, each tried once."""
    times = {}
    for block in (8, 32, 128, ROWS):
        begin = time.process_time()
        run(variant, *operands, block)
        times[block] = time.process_time() - begin
    return min(times, key=times.get)


def measure(vocabulary: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Seconds of process CPU time per variant, least of the rounds."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN).to(dtype)
    weight = (torch.randn(vocabulary, HIDDEN) * 0.1).to(dtype)
    targets = torch.randint(0, vocabulary, (ROWS,))
    operands = (hidden, weight, targets)
    with torch.inference_mode():
        blocks = {v: fastest_block(v, *operands) for v in VARIANTS}
        best = dict.fromkeys(VARIANTS, float("inf"))
        for _ in range(rounds):
            for variant in VARIANTS:
                begin = time.process_time()
                run(variant, *operands, blocks[variant])
                best[variant] = min(best[variant], time.process_time() - begin)
    return best


def resident(name: str) -> float:
    """A memory line of this process's status, in MiB (Linux)."""
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines[name].split()[0]) / 1024


def peak(variant: str, vocabulary: int, dtype: str) -> float:
    """MiB above the operands, in a process of its own."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from benchmarks.score import HIDDEN, ROWS, resident, run\n"
        f"h = torch.zeros(ROWS, HIDDEN).normal_().to(torch.{dtype})\n"
        f"w = torch.empty({vocabulary}, HIDDEN, dtype=torch.{dtype}).normal_()\n"
        f"y = torch.randint(0, {vocabulary}, (ROWS,))\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the high-water mark starts here\n"
        "before = resident('VmRSS')\n"
        f"with torch.inference_mode(): run({variant!r}, h, w, y, 8)\n"
        "print(resident('VmHWM') - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, {options.rounds} rounds")
    print(
        f"{'vocabulary':>10} {'dtype':>9}  "
        + "".join(f"{v:>14}" for v in VARIANTS)
        + "   prift MiB"
    )
    for vocabulary in (151_936, 32_000):
        for dtype in ("float32", "bfloat16"):
            seconds = measure(vocabulary, getattr(torch, dtype), options.rounds)
            ratios = {v: seconds[v] / seconds["projection"] for v in VARIANTS}
            memory = peak("prift", vocabulary, dtype)
            row = "".join(f"{ratios[v]:14.2f}" for v in VARIANTS)
            print(f"{vocabulary:>10,} {dtype:>9}  {row}   {memory:9.0f}", flush=True)
            found.append(
                {"vocabulary": vocabulary, "dtype": dtype, "seconds": seconds, "ratios": ratios,
                 "prift_peak_mib": memory}
            )  # fmt: skip
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
