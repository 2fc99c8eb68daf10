"""The data of a training run: examples, and what the prior thought of them, read from the cache."""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prift.anchor import ANCHORS
from prift.cache import PriorCache
from prift.choice import choose_for, command_for
from prift.dataset import PriorDataset
from prift.errors import CacheError, OptionError
from prift.identity import PriorIdentity
from prift.mapped import MappedArrays, mapped_arrays
from prift.models import turns_by_length
from prift.normalizers import DENOMINATORS
from prift.ranks import is_rank_zero
from prift.request import digest, read_prior, request
from prift.store.remote import open_root
from prift.text.dataspec import DataSpec
from prift.text.examples import Examples
from prift.weigher import Weigher
from prift.weighing import check_weights, weigh, weigh_without_statistics


@dataclass(frozen=True)
class TrainOptions:
    """What is trained, from what, into what. See `prift train --help`.

    Raises OptionError for an anchor or a normaliser that is none.
    """

    model: str
    output: str
    spec: DataSpec
    weigher: Weigher
    cache: str | None = None
    prior: str | None = None
    base_prior: str | None = None
    normalize: str = "tokens"
    anchor: str | None = None
    anchor_weight: float | None = None
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

    def __post_init__(self) -> None:
        if self.anchor not in (None, *ANCHORS):
            raise OptionError(f"unknown anchor {self.anchor!r}. There is: {', '.join(ANCHORS)}.")
        if self.normalize not in DENOMINATORS:
            raise OptionError(
                f"unknown --normalize {self.normalize!r}. There are: {', '.join(DENOMINATORS)}."
            )
        if (self.anchor is None) != (self.anchor_weight is None):
            given, lacking = "--anchor k3", "--anchor-weight L, a factor of the anchor in the loss"
            if self.anchor is None:
                given, lacking = f"--anchor-weight {self.anchor_weight:g}", "--anchor k3"
            raise OptionError(f"{given} needs {lacking}.")
        if self.anchor and not (math.isfinite(self.anchor_weight) and self.anchor_weight >= 0):
            raise OptionError(
                f"--anchor-weight {self.anchor_weight:g}: wanted a finite factor of 0 or more."
            )

    @property
    def reads_prior(self) -> bool:
        """Whether the loss depends on the prior's statistics: its weights, or its anchor."""
        return self.weigher.source == "prior" or bool(self.weigher.base or self.anchor)

    @property
    def skips_rows(self) -> bool:
        """Whether tokens that no gradient comes from are known before training."""
        zeros = bool(self.weigher.needs) or self.weigher.by_role
        return self.weigher.known and zeros and not self.anchor


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    training    cut by its weights, where they are known beforehand
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

    Raises CacheError and MissingPrior where the loss reads the prior and the cache lacks something;
    otherwise the cache only adds the metric drift, and what lacks is said.
    """
    weigher = options.weigher
    needed = options.reads_prior
    specs = [("training", options.spec)]
    if options.eval_data:
        specs.append(("evaluation", _eval_spec(options)))
    names = sorted({"logprob", *(weigher.needs if weigher.source == "prior" else weigher.base)})
    identity, trouble = None, "no cache was named"
    if options.cache is not None:
        try:
            identity = choose_for(options, folder, config, names)
            say(f"prior {identity.id} ({identity.dtype}, {identity.backend})")
        except CacheError as error:
            if needed:
                raise
            trouble = str(error).splitlines()[0]
    elif needed:
        reader = f"--anchor {options.anchor}" if options.anchor else f"rule {weigher.name}"
        raise OptionError(f"{reader} reads the prior: name a cache.")
    base = _base(options, folder, config)
    tokenizer = options.spec.tokenizer_of(folder)
    found: list[PriorDataset] = []
    for purpose, spec in specs:
        examples = spec.examples(tokenizer, config)
        for line in examples.report.lines():
            say(f"{purpose}: {line}")
        prior: Mapping[str, np.ndarray] = {}
        if identity is not None:
            command = command_for(options, spec, identity, folder, config, names)
            try:
                where = (options, spec, folder, config)
                prior = _decoded(where, identity, examples, names, command, base, say)
            except CacheError as error:
                if needed:
                    raise
                trouble = str(error).splitlines()[0]
        if not prior:
            say(f"{purpose}: drift is not measured: {trouble}")
        if options.anchor and (alone := int(np.isneginf(prior["logprob"]).sum())):
            say(f"{purpose}: {alone:,} label tokens have no chance under the prior, and no anchor")
        weights = None
        if weigher.source is None:
            weights = weigh_without_statistics(weigher, examples)
        cut = options.skips_rows and not found and _ends_do_not_matter(config)
        found.append(PriorDataset(examples, prior, cut, options.normalize, weights))
    return TrainingData(found[0], found[1] if len(found) > 1 else None, tokenizer, identity)


def _base(options: TrainOptions, folder: Path, config: Any) -> PriorIdentity | None:
    """The second prior, which a rule that compares two priors wants and no other. Raises
    OptionError."""
    weigher = options.weigher
    wanted = weigher.source == "prior" and bool(weigher.base)
    if wanted != (options.base_prior is not None):
        raise OptionError(
            f"rule {weigher.name} compares two priors: name both, --prior A --prior B."
            if wanted
            else f"--prior was given twice; rule {weigher.name} does not compare two priors."
        )
    if not wanted:
        return None
    return choose_for(replace(options, prior=options.base_prior), folder, config, weigher.base)


def _decoded(
    where: tuple[TrainOptions, DataSpec, Path, Any],
    identity: PriorIdentity,
    examples: Examples,
    names: list[str],
    command: str,
    base: PriorIdentity | None,
    say: Callable[[str], None],
) -> MappedArrays:
    """What training reads of the prior for all label tokens: statistics, or the logprob and the
    weights where the rule's source is the prior. In files that all processes of the machine map;
    one of them reads the cache, whose index is gone once it has."""
    options, spec, folder, config = where
    asked, weigher = request(examples), options.weigher
    place = open_root(options.cache or "")
    known = weigher.source == "prior"
    priors = [identity, *([base] if base is not None else [])]
    parts = [part.name for prior in priors for part in place.parts(prior.id)]
    roles = examples.label_roles() if known and weigher.by_role else np.zeros(0, np.uint8)
    what = [*names, *([weigher.code, *(prior.id for prior in priors)] if known else [])]
    what += [hashlib.sha256(roles).hexdigest()] if len(roles) else []
    key = digest(asked, what, identity.id, parts)

    def tell(line: str) -> None:  # any process may be the one that reads; `say` is rank 0's
        say(line) if is_rank_zero() else print(line, file=sys.stderr)

    def read() -> Mapping[str, np.ndarray]:
        found = read_prior(PriorCache(place, identity), examples, asked, names, command, tell)
        if not known:
            return found
        other = None
        if base is not None:
            second = replace(options, prior=options.base_prior)
            adds = command_for(second, spec, base, folder, config, weigher.base)
            held = PriorCache(place, base)
            other = read_prior(held, examples, asked, weigher.base, adds, tell)
        weights = weigh(weigher, examples.label_counts, found, other, roles)
        check_weights(weigher, weights, examples)
        return {"logprob": found["logprob"], "weights": weights}

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
