"""What a refused allocation looks like, on whatever device, and what training says of it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prift.errors import PriftError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("DefaultCPUAllocator", "out of memory", "std::bad_alloc", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def free_memory() -> None:
    """Gives back what a failed batch left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def training_within(batch: int, accumulation: int, more: list[str], output: str) -> Iterator[None]:
    """Turns a refused allocation into a PriftError that says what to lower.

    batch, accumulation  examples of a micro-batch, and micro-batches of a step
    more                 other ways to need less, in words
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ways = ["lower --max-length", *more]
        if batch > 1:
            halved, twice = batch // 2, -(-batch * accumulation // (batch // 2))
            flags = f"--per_device_train_batch_size {halved} --gradient_accumulation_steps {twice}"
            ways.insert(0, f"take smaller micro-batches, for the same steps: `-- {flags}`")
        raise PriftError(
            "out of memory with micro-batches of "
            f"{batch} examples (--per_device_train_batch_size). To need less: {'; '.join(ways)}. "
            f"Whole checkpoints in {output} are kept: --resume goes on from the last."
        ) from error
