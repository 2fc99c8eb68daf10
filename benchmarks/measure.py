"""Timing and memory for the benchmarks: interleaved rounds, and peaks in a process of their own."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of process CPU time of each, least of the rounds, after one uncounted round."""
    best = dict.fromkeys(variants, float("inf"))
    for count in range(rounds + 1):
        for name, run in variants.items():
            begin = time.process_time()
            run()
            if count:
                best[name] = min(best[name], time.process_time() - begin)
    return best


def wall(variants: Mapping[str, Callable[[], Any]], rounds: int, threads: int) -> dict[str, float]:
    """Seconds of wall time of each with this many threads, least of the interleaved rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
    torch.set_num_threads(before)
    return best


def resident(name: str) -> float:
    """A memory line of this process's status, in MiB (Linux)."""
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines[name].split()[0]) / 1024


def growth(setup: str, statement: str) -> float:
    """Peak resident MiB that `statement` adds to what `setup` left, in a process of its own."""
    return apart(setup, statement)[0]


def apart(setup: str, statement: str, answer: str = "None") -> tuple[float, Any]:
    """(`growth` of the statement, what the expression `answer` then is, through JSON)."""
    code = (
        "import ctypes, json, torch; torch.set_num_threads(1)\n"
        "from benchmarks.measure import resident\n"
        f"{setup}\n"
        "ctypes.CDLL(None).malloc_trim(0)  # what setup freed must not be had for nothing\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the high-water mark starts here\n"
        "before = resident('VmRSS')\n"
        f"{statement}\n"
        f"print(json.dumps([max(resident('VmHWM') - before, 0), {answer}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    mib, found = json.loads(done.stdout.splitlines()[-1])
    return mib, found


def machine() -> str:
    """Kind of machine and versions, in a line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table, ready for docs/benchmarks.md."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---:|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def write(path: str | None, found: Any) -> None:
    """Writes the numbers as JSON where a path is given."""
    if path:
        with open(path, "w") as file:
            json.dump(found, file, indent=1)
