"""Tokens to weigh: random logits with ties, and what the rules make of them."""

import numpy as np
import torch

from prift.methods import weigher
from prift.roles import ROLES
from prift.stats import STATISTICS, TokenStats, token_stats
from prift.weigher import RULES
from tests import rule_references

ALL = STATISTICS["extended"]


def random_case(seed: int, vocabulary: int = 50, rows: int = 200, ties: bool = True):
    """Logits float32 [N, V] and targets [N]; every other one is drawn from the distribution."""
    generator = np.random.default_rng(seed)
    z = generator.normal(0, 2, (rows, vocabulary)).astype(np.float32)
    if ties:
        z = z.round(1)  # many exact ties
    targets = generator.integers(0, vocabulary, rows)
    drawn = (z + generator.gumbel(size=z.shape)).argmax(1)
    return z, np.where(np.arange(rows) % 2, targets, drawn)


def pair(seed: int, rows: int = 120):
    """Logits of two distributions [N, V], targets and sequences [N]; every fifth token stands
    twice, so that scores tie, and sequences of 1 to 30 tokens are mixed."""
    (z, targets), (noise, _) = random_case(seed, rows=rows), random_case(seed + 1, rows=rows)
    base = (z + 0.3 * noise).astype(np.float32).round(2)
    twice = np.arange(rows) - (np.arange(rows) % 5 == 4)
    sequence = np.random.default_rng(seed).integers(0, 9, rows) ** 2
    sequence[rows // 2] = 1000
    return z[twice], base[twice], targets[twice], sequence


def roles(count: int) -> torch.Tensor:
    """uint8 [N]: every role in turn, in an order that has nothing to do with `pair`'s."""
    return torch.tensor([(n * 5) // 2 % len(ROLES) for n in range(count)], dtype=torch.uint8)


def stats_of(z, targets) -> TokenStats:
    return token_stats(torch.tensor(z), torch.tensor(targets), ALL)


def chosen(name: str, source: str = "prior", options=None):
    """The weigher of one rule; options as text."""
    return weigher(name, source if RULES[name].needs else None, options or {})


def weigh(name, source, options, z, base, targets, sequence) -> np.ndarray:
    seen = (stats_of(z, targets), torch.tensor(sequence), stats_of(base, targets))
    rule = chosen(name, source, options)
    return rule(*seen, roles(len(targets))).expand(len(targets)).numpy()


def naive(name, options, z, base, targets, sequence) -> np.ndarray:
    """The same by the reference."""
    kinds = {n: type(p.default) for n, p in RULES[name].options().items()}
    values = {n: kinds[n](text) for n, text in options.items()}
    second = base if RULES[name].base else None
    said = [ROLES[code] for code in roles(len(targets)).tolist()]
    return rule_references.weights(name, z, targets, sequence, second, said, **values)
