"""Both backends over a model folder, as `prift precompute` makes them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from prift.backends import Scorer
from prift.engines import PrecomputeOptions, identify, load_scorer
from prift.models import load_config
from prift.stats import CORE
from tests.vllm.conftest import CORES


@contextmanager
def scorer(folder: str, said: list[str] | None = None, **options) -> Iterator[Scorer]:
    """A scorer of the model in float32, unless `options` say otherwise; ended afterwards.

    options  of PrecomputeOptions
    said     gets what the backend says
    """
    chosen = PrecomputeOptions(**{"dtype": "float32", **options})
    place = Path(folder)
    config = load_config(place)
    identity = identify(place, config, chosen)
    say = (said if said is not None else []).append
    before = os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    if (chosen.tensor_parallel_size or 1) > 1:  # each process has a core of its own
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(CORES[: chosen.tensor_parallel_size])
    try:
        started = load_scorer(folder, place, config, identity, chosen, say)
    finally:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = before
    try:
        yield started
    finally:
        started.close()


Stats = dict[str, np.ndarray]


def all_positions(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.arange(1, len(ids)) for ids in sequences]


def scores(
    scorer: Scorer,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray] | None = None,
    names: Sequence[str] = CORE,
) -> list[Stats]:
    """Of each sequence its statistics, float64 [positions]; {} for one that is left out."""
    where = positions if positions is not None else all_positions(sequences)
    found: list[Stats] = [{} for _ in sequences]
    for i, stats in scorer.score(sequences, where, names):
        assert not found[i], f"sequence {i} was answered twice"
        found[i] = {n: getattr(stats, n).double().numpy() for n in stats.names()}
    return found
