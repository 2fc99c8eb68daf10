"""What `prift weigh` should say: the definitions, token by token, from a cache's rows alone."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from prift.cache import PriorCache, list_priors
from prift.preview import PreviewOptions, preview
from prift.request import request


def run(lab, *weighers, spec=None, **options) -> dict:
    """What `preview` finds for these rules."""
    given = PreviewOptions(lab.model, lab.cache, spec or lab.spec(), weighers, **options)
    return preview(given, lambda line: None)


def naive(lab, spec=None) -> list[dict]:
    """Each label token with its example and statistics, from the cache's rows one by one."""
    (identity,) = list_priors(lab.cache).values()
    cache = PriorCache(lab.cache, identity)
    config = AutoConfig.from_pretrained(lab.model)
    examples, tokenizer = (spec or lab.spec()).load(Path(lab.model), config)
    asked, found = request(examples), []
    for i, example in enumerate(examples):
        names = ["logprob", "log_mass_rank"]
        values = cache.read(asked.keys[i : i + 1], asked.spans[i : i + 1], names)
        for n, place in enumerate(np.flatnonzero(example.label_mask)):
            found.append(
                {
                    "example": i,
                    "where": examples.where(i),
                    "length": len(example.input_ids),
                    "position": int(place),
                    "text": tokenizer.decode([int(example.input_ids[place])]),
                    "logprob": float(values["logprob"][n]),
                    "prob": float(np.exp(values["logprob"][n])),
                    "u": float(np.exp(np.float64(values["log_mass_rank"][n]))),
                }
            )
    return found


def weights_of(tokens: list[dict], rule: str) -> np.ndarray:
    return np.array([t["prob"] if rule == "prob" else float(t["u"] >= 0.5) for t in tokens])


def check_groups(groups: list[dict], owns, tokens: list[dict], weights: np.ndarray) -> None:
    """Each group against the tokens of which owns(group, token) is true."""
    assert sum(group["label_tokens"] for group in groups) == len(tokens)
    for group in groups:
        own = np.array([owns(group, token) for token in tokens])
        assert group["label_tokens"] == own.sum() > 0
        members = {t["example"] for t, mine in zip(tokens, own, strict=True) if mine}
        assert group["examples"] == len(members)
        assert group["kept_share"] == pytest.approx((weights[own] != 0).mean())
        assert group["mean_weight"] == pytest.approx(weights[own].mean(), rel=1e-6)
        assert group["share_of_tokens"] == pytest.approx(own.mean())
        assert group["share_of_weight"] == pytest.approx(weights[own].sum() / weights.sum())


def words(lab, *more, data: tuple[str, ...] = ()) -> list[str]:
    """The command line over these --data, or the lab's own."""
    given = ["--model", lab.model, "--max-length", "60", "--cache", lab.cache]
    for one in data or (lab.data,):
        given += ["--data", one]
    return ["weigh", *given, *more]
