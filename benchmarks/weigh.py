"""How long `prift weigh` takes: `python -m benchmarks.weigh`.

A tiny model scores 10,000 and 100,000 prompt/completion rows, as long as GSM8K's, into caches. What
is measured is `prift weigh` over three rules on the same rows, as a user runs it: a process of its
own, from its start to its last line, wall time, least of the rounds, and the most memory it held.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import machine, table, write
from benchmarks.scale import rows_like_gsm8k
from tests.cli_fixtures import make_model

# A process's own high-water mark: what the kernel tells its parent includes the parent's.
PRIFT = [
    sys.executable,
    "-c",
    "import atexit, runpy, sys\n"
    "from benchmarks.measure import resident\n"
    "atexit.register(lambda: print(resident('VmHWM'), file=sys.stderr))\n"
    "runpy.run_module('prift', run_name='__main__', alter_sys=True)\n",
]
RULES = ["--method", "prift-mass", "--compare", "prob", "--compare", "threshold,low=0.002"]


def ran(command: list[str], output: Path, **environment: str) -> tuple[float, float]:
    """(wall seconds, MiB at most) of a process; what it prints goes to the file."""
    with output.open("w") as file:
        begin = time.perf_counter()
        done = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - begin
    return seconds, float(done.stderr.splitlines()[-1])


def measure(folder: Path, rows: int, rounds: int) -> dict[str, float]:
    """A cache of so many sequences, and the command on it."""
    data, cache = folder / f"{rows}.jsonl", folder / f"cache-{rows}"
    rows_like_gsm8k(data, rows)
    given = ["--model", str(folder / "model"), "--data", str(data), "--cache", str(cache)]
    scoring = [*PRIFT, "precompute", *given, "--no-compile", "--json"]
    ran(scoring, folder / "precompute.json", OMP_NUM_THREADS="1")  # so small a model gains by none
    command = [*PRIFT, "weigh", *given, *RULES]
    least = min(ran(command, folder / "weigh.txt") for _ in range(rounds))
    ran([*command, "--json"], folder / "weigh.json")
    found = json.loads((folder / "weigh.json").read_text())
    counts = {name: found[name] for name in ("examples", "tokens", "label_tokens")}
    return counts | {"rules": len(found["rules"]), "seconds": least[0], "mib": least[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", max_position_embeddings=2048)
        found = [measure(folder, rows, options.rounds) for rows in options.rows]
    table(
        ["sequences", "tokens", "label tokens", "rules", "seconds", "MiB"],
        [[f"{f['examples']:,}", f"{f['tokens']:,}", f"{f['label_tokens']:,}", f"{f['rules']}",
          f"{f['seconds']:.1f}", f"{f['mib']:,.0f}"] for f in found],
    )  # fmt: skip
    write(options.json, {"machine": machine(), "found": found})


if __name__ == "__main__":
    main()
