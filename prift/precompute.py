"""Command 1: examples - cache -> scorer -> cache.

Scores what the cache does not hold yet, so running the same command again continues a run that
was killed, and scores nothing once all is there.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prift import spans
from prift.backends import BadLogits, Scorer, hf
from prift.cache import PriorCache
from prift.dataspec import DataSpec
from prift.errors import ModelError
from prift.examples import Examples
from prift.models import load_config, locate, weight_files
from prift.progress import progress
from prift.request import Request, request
from prift.stats import CORE
from prift.tokenizers import template_digest, tokenizer_digest
from prift.writer import CacheWriter


@dataclass(frozen=True)
class PrecomputeOptions:
    """How the prior is run. See `prift precompute --help`."""

    dtype: str = "auto"
    logits_dtype: str = "float32"
    attention: str = "auto"
    positions: str = "labels"
    batch_tokens: int | None = None
    part_seconds: float = 60.0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Precomputed:
    """What a run did. sequences are distinct; `scored` of them were not in the cache before."""

    prior: str
    folder: str
    examples: int
    sequences: int
    scored: int
    scored_tokens: int
    statistics_tokens: int
    seconds: float


def precompute(
    model: str,
    spec: DataSpec,
    cache_root: str,
    options: PrecomputeOptions | None = None,
    say: Callable[[str], None] = print,
) -> Precomputed:
    """Stores the statistics of every example's tokens under the prior `model`.

    Raises DataError, ModelError, CacheError; rows scored before the error are kept.
    """
    options = options or PrecomputeOptions()
    folder = locate(model, trust_remote_code=options.trust_remote_code)
    config = load_config(folder, options.trust_remote_code)
    weight_files(folder)  # refuses a folder without them before the data are read
    examples, tokenizer = spec.load(folder, config)
    for line in examples.report.lines():
        say(line)
    identity = hf.identify(
        folder,
        config,
        dtype=options.dtype,
        logits_dtype=options.logits_dtype,
        attention=options.attention,
    )
    cache = PriorCache(cache_root, identity)
    wanted = request(examples, options.positions).united()
    todo = wanted.subset(cache.missing(wanted.keys, wanted.spans, CORE))
    scored_tokens = int(examples.lengths[todo.index].sum())
    say(
        f"prior {identity.id}: {len(wanted.keys):,} distinct sequences, "
        f"{len(wanted.keys) - len(todo.keys):,} in the cache, {len(todo.keys):,} to score"
    )
    started = time.monotonic()
    if len(todo.keys):
        scorer = hf.load(
            folder,
            config,
            identity,
            batch_tokens=options.batch_tokens,
            trust_remote_code=options.trust_remote_code,
        )
        provenance = _provenance(model, folder, tokenizer, spec, options, scorer)
        with CacheWriter(cache_root, identity, provenance, options.part_seconds) as writer:
            _score(scorer, examples, todo, writer, scored_tokens)
    return Precomputed(
        prior=identity.id,
        folder=str(cache.folder),
        examples=len(examples),
        sequences=len(wanted.keys),
        scored=len(todo.keys),
        scored_tokens=scored_tokens,
        statistics_tokens=todo.num_positions,
        seconds=time.monotonic() - started,
    )


def _score(
    scorer: Scorer, examples: Examples, todo: Request, writer: CacheWriter, total: int
) -> None:
    size = len(todo.keys)
    sequences = _Lazy(size, lambda i: examples[int(todo.index[i])].input_ids)
    positions = _Lazy(size, lambda i: spans.positions_of(todo.spans[i]))
    with progress("scoring", total=total, unit="tok") as advance:
        try:
            for i, stats in scorer.score(sequences, positions):
                values = {n: getattr(stats, n).numpy() for n in stats.names()}
                length = len(sequences[i])
                writer.add(bytes(todo.keys[i]), length, todo.spans[i], values)
                advance(length)
        except BadLogits as error:
            raise ModelError(
                f"{examples.where(todo.index[error.index])}: the model's logits for token "
                f"{error.position} are NaN, +inf, or all -inf. Nothing of this example was stored. "
                "Half-precision overflow is the usual cause: try --dtype bfloat16 or float32."
            ) from error


class _Lazy(Sequence):
    """A sequence whose items are made when asked for, so that memory stays flat."""

    def __init__(self, size: int, get: Callable[[int], Any]):
        self._size, self._get = size, get

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._size:
            raise IndexError(i)
        return self._get(i)


def _provenance(
    model: str,
    folder: Path,
    tokenizer: Any,
    spec: DataSpec,
    options: PrecomputeOptions,
    scorer: Scorer,
) -> dict[str, str]:
    """What explains the numbers, as strings; names only, no paths of this machine, no text."""
    on_hub = not Path(model).expanduser().exists()
    packages = ("prift", "torch", "transformers", "pyarrow", "numpy")
    facts = {
        "model": model if on_hub else folder.resolve().name,
        "revision": folder.name if on_hub else None,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer),
        "data": [Path(d).name for d in spec.data],
        "positions": options.positions,
        "max_length": spec.text.max_length,
        "batch_tokens": options.batch_tokens,
        "packages": {p: version(p) for p in packages},
        "device": scorer.device_name,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {"prift": json.dumps(facts, sort_keys=True)}
