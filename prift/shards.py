"""Shares of the work: which sequences are whose, when several processes score one data set.

A sequence's share follows from its key alone. So it is the same in every order and window of the
data and whatever the cache holds, equal sequences are one process's, and the shares together are
the whole. Keys are hashes: shares are equal but for the luck of a draw.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prift.cache import sequence_key
from prift.errors import OptionError
from prift.placement import device_of


@dataclass(frozen=True, slots=True)
class Shard:
    """Share `index` of `count`, counted from 0. source: what said so, for messages."""

    index: int
    count: int
    source: str = "--shard"

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise OptionError(
                f"{self.source}: there is no share {self.index} of {self.count}; shares are "
                f"counted from 0: 0/{self.count} to {self.count - 1}/{self.count}"
                if self.count > 0
                else f"{self.source}: {self.count} shares; wanted 1 or more"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def owns(self, input_ids: np.ndarray) -> bool:
        """Whether this sequence is to be scored here."""
        return int.from_bytes(sequence_key(input_ids)[:8], "little") % self.count == self.index


def parse_shard(text: str) -> Shard:
    """'i/n'. Raises OptionError."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None:
        raise OptionError(f"--shard {text}: wanted i/n, as in 0/4 to 3/4 for four shares")
    return Shard(int(match[1]), int(match[2]))


def choose_shard(text: str | None) -> tuple[Shard | None, str | None]:
    """(the share that `text` says, or else the environment; the device of this process where it
    was started beside others on this machine). None: all of the sequences, all of the devices."""
    started = shard_from_environment()
    shard = started if text is None else parse_shard(text)
    return shard, None if started is None else device_of(local_rank())


def shard_from_environment(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """The share of a process that torchrun or srun started beside others; None for one alone.

    Raises OptionError for variables that are no such numbers.
    """
    names = _names(environment)
    if names is None:
        return None
    rank, size, _ = names
    source = f"{rank}, {size}"
    try:
        index, count = int(environment[rank]), int(environment[size])
    except ValueError as error:
        raise OptionError(
            f"{rank}={environment[rank]} and {size}={environment[size]} should be whole numbers. "
            "Mend them, or say the share with --shard i/n"
        ) from error
    return None if count == 1 and index == 0 else Shard(index, count, source)


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of this process among those that were started together on this machine."""
    names = _names(environment)
    given = "" if names is None else environment.get(names[2], "")
    return int(given) if given.isdecimal() else None


def _names(environment: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The variables of rank, size and local rank that hold here."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "RANK", "WORLD_SIZE", "LOCAL_RANK"
    # A batch script that srun did not start is told the job's tasks too, and is all there is.
    step = any(name in environment for name in ("SLURM_STEP_ID", "SLURM_STEPID"))
    if "SLURM_JOB_ID" in environment and not step:
        return None
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        return "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    return None
