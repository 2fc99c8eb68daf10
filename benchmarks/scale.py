"""Whether stage 1 stays flat in memory and linear in time: `python -m benchmarks.scale`.

Runs `prift precompute` in a process of its own over 10,000 and 100,000 prompt/completion rows, as
long as GSM8K's, through a tiny model, and samples its resident memory. Prints seconds, tokens a
second, and the memory in the first and the second half of the run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.measure import machine, table, write
from tests.cli_fixtures import make_model
from tests.lab import WORDS


def rows_like_gsm8k(path: Path, rows: int) -> None:
    """Distinct prompts and completions; about 50 and 110 tokens in the toy tokenizer."""
    generator = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            prompt, answer = (
                " ".join(generator.choices(WORDS, k=max(3, round(generator.lognormvariate(*of)))))
                for of in ((3.1, 0.4), (3.9, 0.45))
            )
            file.write(json.dumps({"prompt": f"{number} {prompt}", "completion": f" {answer}"}))
            file.write("\n")


def run(folder: Path, rows: int) -> dict:
    """One run over so many rows: the command's own numbers, and resident MiB twice a second."""
    data, cache = folder / f"{rows}.jsonl", folder / f"cache-{rows}"
    rows_like_gsm8k(data, rows)
    command = [sys.executable, "-m", "prift", "precompute", "--model", str(folder / "model")]
    command += ["--data", str(data), "--cache", str(cache), "--no-compile", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    resident: list[float] = []

    def watch() -> None:
        page = os.sysconf("SC_PAGESIZE") / 2**20
        while process.poll() is None:
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                return
            resident.append(pages * page)
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = json.loads(process.communicate()[0])
    watcher.join()
    half = len(resident) // 2
    return found | {"first_mib": max(resident[:half]), "second_mib": max(resident[half:])}


def measure(sizes: list[int]) -> list[dict]:
    """A run of each size, on one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", max_position_embeddings=2048)
        return [run(folder, rows) for rows in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    print(machine())
    found = measure(options.rows)
    table(
        ["sequences", "tokens", "seconds", "tokens/s", "MiB, first half", "MiB, second half"],
        [[f"{r['sequences']:,}", f"{r['scored_tokens']:,}", f"{r['seconds']:.1f}",
          f"{r['scored_tokens'] / r['seconds']:,.0f}", f"{r['first_mib']:,.0f}",
          f"{r['second_mib']:,.0f}"] for r in found],
    )  # fmt: skip
    write(options.json, {"machine": machine(), "rows": found})


if __name__ == "__main__":
    main()
