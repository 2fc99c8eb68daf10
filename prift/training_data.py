"""The data of a training run: examples, and what the prior thought of them, read from the cache."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prift.cache import PriorCache, list_priors
from prift.dataset import PriorDataset
from prift.dataspec import DataSpec
from prift.errors import CacheError, OptionError
from prift.examples import Examples
from prift.identity import PriorIdentity, config_digest, weights_digest
from prift.mapped import MappedArrays, mapped_arrays
from prift.models import (
    attention_for,
    checkpoint_dtype,
    load_config,
    locate,
    turns_by_length,
    weight_files,
)
from prift.ranks import from_rank_zero
from prift.request import choose_prior, digest, read_prior, request
from prift.weigher import Weigher


@dataclass(frozen=True)
class TrainOptions:
    """What is trained, from what, into what. See `prift train --help`."""

    model: str
    output: str
    spec: DataSpec
    weigher: Weigher
    cache: str | None = None
    prior: str | None = None
    eval_data: tuple[str, ...] = ()
    eval_split: str | None = None
    dtype: str = "float32"
    attention: str = "auto"
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_target: str = "all-linear"
    merge: bool = False
    resume: bool = False
    full_metrics_steps: int | None = None
    skip_check: bool = False
    packing: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    training    cut by its weights, where the rule's source is the prior
    evaluation  whole, or None
    prior       whose statistics these are, or None
    """

    training: PriorDataset
    evaluation: PriorDataset | None
    tokenizer: Any
    prior: PriorIdentity | None

    def close(self) -> None:
        """Lets go of the decoded statistics, whose files go once no process of the machine holds
        them."""
        self.training.close()
        if self.evaluation is not None:
            self.evaluation.close()


def load_data(
    options: TrainOptions, folder: Path, config: Any, say: Callable[[str], None]
) -> TrainingData:
    """The examples, with the prior's statistics beside them.

    Raises CacheError and MissingPrior where the rule's source is the prior and the cache lacks
    something; for other rules the cache only adds the metric drift, and what lacks is said.
    """
    needed = options.weigher.source == "prior"
    specs = [("training", options.spec)]
    if options.eval_data:
        specs.append(("evaluation", _eval_spec(options)))
    identity, trouble = None, "no cache was named"
    if options.cache is not None:
        try:
            identity = _choose(options, folder, config)
            say(f"prior {identity.id} ({identity.dtype}, {identity.backend})")
        except CacheError as error:
            if needed:
                raise
            trouble = str(error).splitlines()[0]
    elif needed:
        raise OptionError(f"rule {options.weigher.name} reads the prior: name a cache.")
    tokenizer = options.spec.tokenizer_of(folder)
    names = sorted({"logprob", *options.weigher.needs})
    found: list[PriorDataset] = []
    for purpose, spec in specs:
        examples = spec.examples(tokenizer, config)
        for line in examples.report.lines():
            say(f"{purpose}: {line}")
        prior: Mapping[str, np.ndarray] = {}
        if identity is not None:
            command = _command(options, spec, identity, folder, config)
            try:
                prior = _decoded(options.cache, identity, examples, names, command)
            except CacheError as error:
                if needed:
                    raise
                trouble = str(error).splitlines()[0]
        if not prior:
            say(f"{purpose}: drift is not measured: {trouble}")
        cuts = needed and not found and _ends_do_not_matter(config)
        cuts = cuts and options.weigher.scope == "token"  # others see who is in the batch
        found.append(PriorDataset(examples, prior, options.weigher if cuts else None))
    return TrainingData(found[0], found[1] if len(found) > 1 else None, tokenizer, identity)


def _decoded(
    root: str | None, identity: PriorIdentity, examples: Examples, names: list[str], command: str
) -> MappedArrays:
    """Statistics of all label tokens, in files that all processes of the machine map. One of them
    reads the cache, whose index is gone once it has."""
    asked = request(examples)
    key = digest(asked, names, Path(root or "").expanduser() / identity.id)

    def read() -> Mapping[str, np.ndarray]:
        return read_prior(PriorCache(root or "", identity), examples, asked, names, command)

    return mapped_arrays(key, read)


def _ends_do_not_matter(config: Any) -> bool:
    """Whether a token's loss is the same however much stands behind it, so that what has no weight
    may be cut off: not where experts are balanced over all tokens, nor where positions turn by
    angles that depend on how long the batch is."""
    balanced = getattr(config, "output_router_logits", False)
    return not balanced and not turns_by_length(config)


def _eval_spec(options: TrainOptions) -> DataSpec:
    """The same text options over the evaluation data: all of it, and its own split."""
    text = replace(options.spec.text, limit=None, split=options.eval_split)
    return replace(options.spec, data=options.eval_data, weights=(), text=text)


def _is_id(prior: str | None) -> bool:
    return bool(re.fullmatch("[0-9a-f]{8,64}", prior or "")) and not Path(prior or "").exists()


def _choose(options: TrainOptions, folder: Path, config: Any) -> PriorIdentity:
    """The prior of the cache that --prior names, or the model's own."""
    weights, digest = "", ""
    if list_priors(options.cache) and not _is_id(options.prior):
        if options.prior:
            folder = locate(options.prior, "--prior", options.trust_remote_code)
            config = load_config(folder, options.trust_remote_code)
        files = weight_files(folder)
        weights, digest = from_rank_zero(lambda: weights_digest(files)), config_digest(config)
    return choose_prior(
        options.cache,
        weights,
        digest,
        options.prior if _is_id(options.prior) else None,
        _command(options, options.spec, None, folder, config),
    )


def _command(
    options: TrainOptions,
    spec: DataSpec,
    identity: PriorIdentity | None,
    folder: Path,
    config: Any,
) -> str:
    """The precompute command that adds these examples to the prior being read."""
    model = options.prior or options.model
    if options.prior and spec.tokenizer is None:
        spec = replace(spec, tokenizer=options.model)  # the ids are the trainee's
    if _is_id(options.prior):
        model = f"THE_MODEL_OF_{options.prior}"
    words = spec.precompute_command(model, options.cache or "CACHE")
    if identity is None:
        return words
    more = []
    own = options.prior is None
    if not own or identity.dtype != checkpoint_dtype(folder, config):
        more += ["--dtype", identity.dtype]
    if not own or identity.attention != attention_for(config):
        more += ["--attention", identity.attention]
    if identity.logits_dtype != "float32":
        more += ["--logits-dtype", identity.logits_dtype]
    return f"{words} {shlex.join(more)}".rstrip()
