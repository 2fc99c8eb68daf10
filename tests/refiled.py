"""Caches whose rows hold other values than the model said, under the same keys and identity."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from prift.cache import PriorCache, list_priors
from prift.methods import METHODS, weigher
from prift.models import load_config, load_model
from prift.request import request
from prift.stats import CORE
from prift.store.writer import CacheWriter
from prift.training_data import TrainOptions, load_data
from tests.lab import Lab

DIFFERS = "the model does not say what prior"
AGREES = "the model agrees with the prior"


def rows_of(lab: Lab, text: dict | None = None, model: str | None = None):
    """(keys, lengths, runs) of the lab's examples."""
    folder = Path(model or lab.model)
    spec = lab.spec(**text or {})
    examples = spec.examples(spec.tokenizer_of(folder), load_config(folder))
    asked = request(examples)
    return asked.keys, examples.lengths, asked.spans


def values_of(cache: str, keys, spans) -> list[dict[str, np.ndarray]]:
    """What the one prior of a cache says of each row."""
    (identity,) = list_priors(cache).values()
    read = PriorCache(cache, identity)
    return [read.read(keys[i : i + 1], spans[i : i + 1], CORE) for i in range(len(keys))]


def refile(
    lab: Lab, target: Path, values: list[dict[str, np.ndarray]], text: dict | None = None
) -> str:
    """A cache in which these values are filed as those of the lab's examples, by its prior."""
    (identity,) = list_priors(lab.cache).values()
    with CacheWriter(target, identity, {"prift": "{}"}) as writer:
        for key, length, runs, own in zip(*rows_of(lab, text), values, strict=True):
            writer.add(key.ljust(16, b"\0"), int(length), runs, own)
    return str(target)


def changed(
    lab: Lab,
    target: Path,
    change: Callable,
    text: dict | None = None,
    only: Collection[int] | None = None,
) -> str:
    """The lab's cache with `change` made to each row, or to those in `only`."""
    keys, _, spans = rows_of(lab, text)
    values = values_of(lab.cache, keys, spans)
    new = [
        {n: change(v) for n, v in row.items()} if only is None or i in only else row
        for i, row in enumerate(values)
    ]
    return refile(lab, target, new, text)


def shifted(values: np.ndarray) -> np.ndarray:
    return np.roll(values, 1)


def loaded(lab: Lab, cache: str):
    """(arguments of check_start behind the model, the model) of a run from this cache."""
    chosen = weigher(*METHODS["prift-prob"], {})
    options = TrainOptions(lab.model, "out", lab.spec(), chosen, cache=cache)
    folder = Path(lab.model)
    config = load_config(folder)
    data = load_data(options, folder, config, lambda line: None)
    model = load_model(folder, config, dtype="float32", attention="sdpa")
    return (data.training, data.prior, options, folder), model
