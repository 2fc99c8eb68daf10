"""Work that one process does for all: rank 0 alone hashes the model and writes shared files."""

import os
from collections.abc import Callable
from typing import Any

import torch.distributed


def is_rank_zero() -> bool:
    """True in the first process of a distributed run, and in a run of one process."""
    return int(os.environ.get("RANK", "0")) == 0


def from_rank_zero(compute: Callable[[], Any]) -> Any:
    """The value that rank 0 computes, in every process; its error too.

    Needs an initialised process group where there is more than one process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
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
