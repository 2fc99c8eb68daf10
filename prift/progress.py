"""Progress bars for long work: on stderr, silent when stderr is not a terminal, and in all but
the first process that torchrun starts.

with progress("scoring", total=n, unit="tok") as advance:
    advance(512)
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    description: str, total: int | Callable[[], int] | None, unit: str
) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar by a number of `unit`s; shows rate and time left.

    total  a function where it grows: asked at each step
    """
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=False,
    )
    with bar:
        known = total if callable(total) else lambda: total
        task = bar.add_task(description, total=known(), rate="")
        started = time.monotonic()

        def advance(amount: int) -> None:
            bar.advance(task, amount)
            rate = bar.tasks[0].completed / (time.monotonic() - started)
            bar.update(task, total=known(), rate=f"{rate:,.0f} {unit}/s")

        yield advance
