"""Who runs the prior. A backend is one module here with a class that keeps the Scorer protocol.

A scorer knows token ids and nothing else: no text, no dataset, no labels, no cache.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from prift.identity import PriorIdentity
from prift.stats import CORE, TokenStats


class BadLogits(Exception):
    """The model answered `position` of sequence `index` with something that is no distribution."""

    def __init__(self, index: int, position: int):
        super().__init__(f"sequence {index}, position {position}")
        self.index, self.position = index, position


class TooLarge(Exception):
    """Sequence `index` does not fit into memory even alone."""

    def __init__(self, index: int):
        super().__init__(f"sequence {index}")
        self.index = index


class TooLong(Exception):
    """Sequence `index` has to be run for more tokens than the `most` that the backend takes."""

    def __init__(self, index: int, most: int):
        super().__init__(f"sequence {index}")
        self.index, self.most = index, most


class Scorer(Protocol):
    """Runs one frozen prior over token sequences."""

    identity: PriorIdentity
    device_name: str

    def score(
        self,
        sequences: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        names: Sequence[str] = CORE,
    ) -> Iterator[tuple[int, TokenStats]]:
        """Statistics at `positions` (int64, sorted, >= 1) of each sequence (int32 ids).

        names  the core, and those of stats.EXTENDED that are named

        Yields (index, stats [len(positions[index])] on the CPU) in whatever order is fastest; not
        those that the backend cannot score exactly. Raises BadLogits where the model answers with
        NaN, +inf, or all -inf; TooLarge; TooLong.
        """
        ...

    def close(self) -> None:
        """Gives back what the backend has started. Nothing is scored afterwards."""
        ...
