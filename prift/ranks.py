"""Work that one process does for all (rank 0 alone hashes the model and writes shared files), and
what all must agree on."""

import gc
import os
from collections.abc import Callable
from typing import Any

import torch.distributed


def is_rank_zero() -> bool:
    """True in the first process of a distributed run, and in a run of one process."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_and_size() -> tuple[int, int]:
    """(number of this process, how many there are): (0, 1) in a run of one process."""
    if not _is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def from_rank_zero(compute: Callable[[], Any]) -> Any:
    """The value that rank 0 computes, in every process; its error too.

    Needs an initialised process group where there is more than one process.
    """
    if not _is_distributed():
        return compute()
    box: list[Any] = [None]
    if is_rank_zero():
        try:
            box = [(compute(), None)]
        except Exception as error:
            box = [(None, error)]
    torch.distributed.broadcast_object_list(box, src=0)
    value, error = box[0]
    if error is not None:
        raise error
    return value


def from_each_rank(compute: Callable[[], Any]) -> list[Any]:
    """The values that the ranks compute, in order, in every process; the first one's error too,
    so that none waits for one that failed."""
    if not _is_distributed():
        return [compute()]
    try:
        own = compute(), None
    except Exception as error:
        own = None, error
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    for _, error in found:
        if error is not None:
            raise error
    return [value for value, _ in found]


def leave() -> None:
    """Ends the process group, at the end of a run. A thread of it that lets go of its last work
    while Python ends would abort the process; and what wrapped the model keeps the group alive, so
    that goes first: it would wait for that thread, and have it wait for Python's lock."""
    if _is_distributed():
        group = torch.distributed.group.WORLD
        gc.collect()
        torch.distributed.destroy_process_group()
        del group  # waits without the lock


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
