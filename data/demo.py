"""The main job, end to end, on the embedded model and data: `make demo` runs this.

Scores the demonstrations once with the pretrained model, trains four methods from that one cache,
and measures each on the test set. Every number printed was measured in this run.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL, TRAIN, EVAL, TEST = (
    HERE / "model",
    HERE / "demo" / "train.jsonl",
    HERE / "demo" / "eval.jsonl",
    HERE / "demo" / "test.jsonl",
)
# One thread: this model is too small to share out, and two threads that wait for each other on a
# machine that is busy with something else are ten times slower than one.
ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
METHODS = ("sft", "dft", "prift-prob", "prift-mass")
TRAINING = (
    "--num_train_epochs 2 --per_device_train_batch_size 16 --learning_rate 5e-4 "
    "--lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0.01 --save_strategy no "
    "--logging_strategy epoch --seed 0"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="made anew")
    parser.add_argument("--limit", type=int, help="test items to solve; default all")
    options = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(options.output, ignore_errors=True)
    cache = options.output / "cache"
    for data in (TRAIN, EVAL):
        prift("precompute", "--model", MODEL, "--data", data, "--cache", cache)
    rows = [measure("pretrained", MODEL, None, options.limit)]
    for method in METHODS:
        output = options.output / method
        # fmt: off
        prift(
            "train", "--model", MODEL, "--data", TRAIN, "--eval-data", EVAL, "--cache", cache,
            "--method", method, "--output", output, "--", *TRAINING,
        )
        # fmt: on
        rows.append(measure(method, output, output / "trainer_state.json", options.limit))
    show(rows, options.output, time.monotonic() - started)


def prift(*words: object) -> None:
    """Runs a prift command as a user would, showing it first."""
    command = ["prift", *(_short(w) for w in words)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True, env={**ENVIRONMENT, **os.environ})


def _short(word: object) -> str:
    """Paths below the working directory without it."""
    if isinstance(word, Path) and word.is_relative_to(Path.cwd()):
        return str(word.relative_to(Path.cwd()))
    return str(word)


def measure(name: str, model: Path, state: Path | None, limit: int | None) -> dict:
    """Solves the test set greedily and collects what the run logged."""
    sys.path.insert(0, str(HERE))
    from evaluate import accuracy
    from transformers.utils import logging

    logging.disable_progress_bar()
    right, total = accuracy(model, TEST, limit)
    found = {"name": name, "right": right, "total": total}
    if state is not None:
        history = json.loads(state.read_text())["log_history"]
        for entry in history:
            found |= {k: v for k, v in entry.items() if isinstance(v, (int, float))}
    print(f"{name}: {right} of {total} test problems solved", flush=True)
    return found


def show(rows: list[dict], output: Path, seconds: float) -> None:
    """The table, and where the checkpoints are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"One cache, four methods ({rows[0]['total']} test problems, greedy)")
    for title in ("method", "solved", "eval nll", "eval drift", "mean weight", "zero weight"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in rows:
        numbers = [
            f"{row[key]:.3f}" if key in row else ""
            for key in ("eval_nll", "eval_drift", "eval_mean_weight", "eval_zero_share")
        ]
        table.add_row(row["name"], f"{row['right'] / row['total']:.1%}", *numbers)
    console = Console(width=max(80, Console().width))
    console.print()
    console.print(table)
    print(
        "eval nll: nats a token on held-out demonstrations\n"
        "eval drift: mean of log p - log q there, q being the pretrained model\n"
        "mean weight, zero weight: over the label tokens there\n\n"
        f"checkpoints: {', '.join(str(output / row['name']) for row in rows[1:])}\n"
        f"{seconds:.0f} seconds in all"
    )


if __name__ == "__main__":
    main()
