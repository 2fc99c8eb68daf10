"""What rules would do to a data set, told from the cache before anything is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prift.errors import OptionError
from prift.groups import Groups
from prift.methods import weigher as weigher_of
from prift.scored import Scored, read_scored, refuse_unknown_weights
from prift.store.histograms import bins, counted
from prift.sweep import Sweep, sweeps
from prift.text.dataspec import DataSpec
from prift.weigher import Weigher
from prift.weighing import check_weights, places, weigh

_EDGES = (-np.inf, *(i / 10 for i in range(11)), 2.0, 4.0, 8.0, 16.0, np.inf)
_BEFORE, _AFTER = 12, 4  # tokens of context


@dataclass(frozen=True)
class PreviewOptions:
    """What is weighed, and by which rules. See `prift weigh --help`.

    weighers    rules whose source is the prior
    tokens      how many of the most and of the least weighted tokens are shown
    thresholds  values of options to compare, as text: see sweep.sweeps
    """

    model: str
    cache: str
    spec: DataSpec
    weighers: tuple[Weigher, ...]
    prior: str | None = None
    tokens: int = 8
    thresholds: Mapping[str, Sequence[str]] = field(default_factory=dict)
    trust_remote_code: bool = False


def preview(options: PreviewOptions, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All that `prift weigh --json` prints; shares and means are over label tokens.

    Raises OptionError for a rule that the prior does not decide, MissingPrior for data or a
    statistic that the cache lacks, DataError, CacheError, ModelError, and PriftError for weights
    that are not finite.
    """
    if options.tokens < 0:
        raise OptionError(f"--tokens {options.tokens} should be a number of tokens, 0 or more")
    for one in options.weighers:
        refuse_unknown_weights(one, "weigh", "known before training")
    compared = sweeps(_with_mass(options.weighers), options.thresholds)
    tried = (one for sweep in compared for one in sweep.weighers)
    names = {"logprob"}.union(*(one.needs for one in (*options.weighers, *tried)))
    scored = read_scored(options, names, say)
    examples, prior = scored.examples, scored.prior
    groups = Groups(examples, options.spec.data)
    return {
        "prior": scored.identity.id,
        "examples": len(examples),
        "tokens": examples.num_tokens,
        "label_tokens": examples.num_labels,
        "sft_loss": _loss(np.ones(examples.num_labels, np.float32), prior["logprob"]),
        "rules": [_described(one, scored, groups, options.tokens) for one in options.weighers],
        "thresholds": [_swept(one, scored, groups.roles) for one in compared],
    }


def _with_mass(weighers: tuple[Weigher, ...]) -> tuple[Weigher, ...]:
    """And the rule mass, where none of these has it: its thresholds are always shown."""
    named = {factor.rule.name for one in weighers for factor in one.factors}
    return weighers if "mass" in named else (*weighers, weigher_of("mass", "prior", {}))


def _swept(sweep: Sweep, scored: Scored, roles: np.ndarray) -> dict[str, Any]:
    """What is kept at each value of an option."""
    found = []
    for value, one in zip(sweep.values, sweep.weighers, strict=True):
        weights = weigh(one, scored.examples.label_counts, scored.prior, roles=roles)
        check_weights(one, weights, scored.examples)
        mean = float(weights.mean(dtype=np.float64))
        found.append({"value": value, "kept_share": _share(weights), "mean_weight": mean})
    one = sweep.weighers[0]
    others = _arguments(one)
    del others[sweep.number][sweep.option]
    return {
        "rule": one.name,
        "arguments": others,
        "option": sweep.option,
        "of": sweep.rule,
        "values": found,
    }


def _described(weigher: Weigher, scored: Scored, groups: Groups, count: int) -> dict[str, Any]:
    examples, prior = scored.examples, scored.prior
    weights = weigh(weigher, examples.label_counts, prior, roles=groups.roles)
    check_weights(weigher, weights, examples)
    mean = float(weights.mean(dtype=np.float64))
    return {
        "rule": weigher.name,
        "arguments": _arguments(weigher),
        "mix": weigher.mix,
        "min_weight": weigher.least,
        "max_weight": weigher.most,
        "kept_share": _share(weights),
        "mean_weight": mean,
        **_effective(weights),
        "loss": _loss(weights, prior["logprob"]),
        "learning_rate_factor": 1 / mean if mean > 0 else None,
        "histogram": _histogram(weights),
        **groups.shares(weights),
        "most": _tokens(scored, weights, _first(-weights, count)),
        "least": _tokens(scored, weights, _first(weights, count)),
    }


def _arguments(weigher: Weigher) -> list[dict[str, Any]]:
    """Options given to each of its rules, as JSON can say them: 'inf' for infinity."""
    return [
        {k: str(v) if v in (np.inf, -np.inf) else v for k, v in factor.arguments.items()}
        for factor in weigher.factors
    ]


def _share(weights: np.ndarray) -> float:
    return float(np.count_nonzero(weights) / len(weights))


def _effective(weights: np.ndarray) -> dict[str, float]:
    """(sum w)^2 / sum w^2: so many tokens of equal weight say as much; and their share."""
    squares = np.square(weights, dtype=np.float64).sum()
    tokens = float(weights.sum(dtype=np.float64) ** 2 / squares) if squares else 0.0
    return {"effective_tokens": tokens, "effective_share": tokens / len(weights)}


def _loss(weights: np.ndarray, logprob: np.ndarray) -> float | None:
    """Mean over label tokens of w * -log q(y), in nats: the loss where the model is the prior.
    None where it is infinite."""
    used = weights != 0
    loss = float(-np.dot(weights[used].astype(np.float64), logprob[used]) / len(weights))
    return loss + 0.0 if np.isfinite(loss) else None  # never -0


def _histogram(weights: np.ndarray) -> list[dict[str, Any]]:
    """Bins from <= w < to, in which exactly 0 and exactly 1 are bins of their own."""
    found = bins(*counted(weights[(weights != 0) & (weights != 1)], _EDGES))
    for value in (0.0, 1.0):
        own = {"from": value, "to": value, "count": int(np.count_nonzero(weights == value))}
        found.insert(next(i for i, one in enumerate(found) if one["from"] == value), own)
    return found


def _first(keys: np.ndarray, count: int) -> np.ndarray:
    """Where the smallest are, ascending; among equals a fixed random choice."""
    count = min(count, len(keys))
    if not count:
        return np.zeros(0, np.int64)
    last = np.partition(keys, count - 1)[count - 1]
    found, tied = np.flatnonzero(keys < last), np.flatnonzero(keys == last)
    drawn = np.random.default_rng(0).choice(tied, count - len(found), replace=False)
    return np.concatenate([found[np.argsort(keys[found], kind="stable")], np.sort(drawn)])


def _tokens(scored: Scored, weights: np.ndarray, at: np.ndarray) -> list[dict[str, Any]]:
    """Label tokens with the text around them."""
    found = []
    for token, (index, place) in zip(at, places(scored.examples, at), strict=True):
        ids, begin = scored.examples[index].input_ids, max(0, place - _BEFORE)
        spans = (ids[begin:place], ids[place : place + 1], ids[place + 1 : place + 1 + _AFTER])
        texts = [scored.tokenizer.decode(span.tolist()) for span in spans]
        likely = float(scored.prior["logprob"][token])
        found.append(
            {
                "where": scored.examples.where(index),
                "position": place,
                "weight": float(weights[token]),
                "logprob": likely if np.isfinite(likely) else None,
                **dict(zip(("before", "token", "after"), texts, strict=True)),
            }
        )
    return found
