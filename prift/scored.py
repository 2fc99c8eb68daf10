"""A data set with its prior's statistics beside it, for commands that train nothing."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prift.cache import PriorCache
from prift.choice import Reader, choose_for, command_for
from prift.errors import OptionError
from prift.identity import PriorIdentity
from prift.models import load_config, locate
from prift.request import read_prior, request
from prift.store.remote import open_root
from prift.text.examples import Examples
from prift.weigher import Weigher


@dataclass(frozen=True)
class Scored:
    """Examples, the tokenizer that made them, and the statistics of their label tokens, flat over
    all examples in order, of the prior `identity`."""

    identity: PriorIdentity
    examples: Examples
    tokenizer: Any
    prior: Mapping[str, np.ndarray]


def read_scored(options: Reader, names: Collection[str], say: Callable[[str], None]) -> Scored:
    """The data of these options and these statistics of them. No model is loaded.

    Raises MissingPrior for data that the cache lacks, DataError, CacheError, ModelError.
    """
    names = sorted(names)
    folder = locate(options.model, trust_remote_code=options.trust_remote_code)
    config = load_config(folder, options.trust_remote_code)
    identity = choose_for(options, folder, config, names)
    say(f"prior {identity.id} ({identity.dtype}, {identity.backend})")
    examples, tokenizer = options.spec.load(folder, config)
    for line in examples.report.lines():
        say(line)
    command = command_for(options, options.spec, identity, folder, config, names)
    cache = PriorCache(open_root(options.cache), identity)
    prior = read_prior(cache, examples, request(examples), names, command, say)
    return Scored(identity, examples, tokenizer, prior)


def refuse_unknown_weights(weigher: Weigher, command: str, done: str) -> None:
    """Raises OptionError for a rule whose weights one prior does not decide.

    done  what the command does with weights: 'exported'
    """
    if weigher.source == "online":
        raise OptionError(
            f"rule {weigher.name} is asked for with the model in training as its source, whose "
            f"statistics change with every step: only weights from the prior can be {done}."
        )
    if weigher.base:
        raise OptionError(
            f"rule {weigher.name} compares two priors, which {command} does not read."
        )
