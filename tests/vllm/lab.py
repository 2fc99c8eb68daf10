"""A model that vLLM runs, data, and `prift precompute --backend vllm` as a process of its own."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from prift.store.parts import check_hash
from tests.lab import Lab
from tests.vllm import models

PROGRAM = "import prift_cli; prift_cli.main()"
_CALLED = """
import multiprocessing, os, psutil, signal
import prift_cli
from prift.backends.vllm import VLLMScorer
from prift.scoring import Storing
handle, score, rows = Storing.handle, VLLMScorer.score, []
def count():
    rows.append(1)
    if len(rows) == {row}:
        {moment}
def stored(self, item):
    handle(self, item)
    if isinstance(item, tuple):
        count()
def scored(*asked):
    for row in score(*asked):
        yield row
        count()
{patched}
prift_cli.main()
"""


def at_row(row: int, moment: str, stored: bool = False) -> str:
    """A program that is the command, and does `moment` once it has so many rows.

    stored  handed to the writer's files; else scored
    """
    patched = "Storing.handle = stored" if stored else "VLLMScorer.score = scored"
    return _CALLED.format(row=row, moment=moment, patched=patched)


class VLLMLab(Lab):
    """As tests.lab.Lab, with a model whose heads are wide enough."""

    def __init__(self, root: Path, rows: int = 40, **sizes):
        super().__init__(root, rows=rows)
        models.make(Path(self.model), "llama", tied=True, **sizes)

    def words(self, *more: str) -> list[str]:
        return [
            *("precompute", "--backend", "vllm", "--model", self.model, "--data", self.data),
            *("--cache", self.cache, "--max-length", "60", "--dtype", "float32", *more),
        ]

    def start(self, *more: str, program: str = PROGRAM) -> subprocess.Popen:
        """The command, in a process group of its own, as a shell starts it."""
        return subprocess.Popen(
            [sys.executable, "-c", program, *self.words(*more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            process_group=0,
        )

    def run(self, *more: str, program: str = PROGRAM) -> subprocess.CompletedProcess:
        """The command to its end. Fails where processes of it are left."""
        process = self.start(*more, program=program)
        out, err = process.communicate(timeout=400)
        assert not left_over(process.pid), f"processes are left: {left_over(process.pid)}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def rows(self) -> int:
        """In all visible parts, each of which is whole."""
        parts = list(Path(self.cache).glob("*/parts/[!.]*.parquet"))
        for part in parts:
            check_hash(part)
        return sum(pq.ParquetFile(part).metadata.num_rows for part in parts)


def left_over(group: int, patience: float = 20.0) -> list[str]:
    """Command lines of processes in the process group that do not end, after some seconds."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(OSError, psutil.Error):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.info["cmdline"] or ["?"])[:120])
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.25)
