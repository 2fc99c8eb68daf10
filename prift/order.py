"""The order of the training data, from seed and epoch alone."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


class OrderOfEpoch(torch.utils.data.Sampler):
    """A sampler whose order is drawn anew from a seed, asked for as each epoch begins.

    transformers draws it from the process's random numbers, of which dropout takes some. So a run
    that is resumed after its first epoch would see another order, and two processes whose batches
    differ in size would disagree about it.
    """

    def __init__(self, sampler: Any, seed: Callable[[], int]):
        self._sampler, self._seed = sampler, seed

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed())
        return iter(self._sampler)
