"""Weights from statistics: one small function per rule; its signature is its options.

A rule sees flat label tokens [N]: no padding, no mask, no shift. It does not know whether its
statistics come from the frozen prior or from the model in training: that is `--source`, and it
makes DFT and PriFT-prob the same rule. The caller detaches the weights.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from prift.errors import OptionError
from prift.stats import TokenStats

SOURCES = ("prior", "online")


@dataclass(frozen=True, slots=True)
class Rule:
    """A registered rule.

    name      as given to --rule
    needs     statistics it reads
    function  (stats [N], **options) -> weights float32 [N]; of scope 'sequence':
              (stats [N], sequence_N int64, **options)
    scope     what one weight depends on: 'token', that token's statistics; 'sequence', those of
              its sequence's label tokens; 'batch', those of all tokens it is given, which online
              is one micro-batch on one device
    signed    whether its weights may be negative
    """

    name: str
    needs: tuple[str, ...]
    function: Callable[..., Tensor]
    scope: str = "token"
    signed: bool = False

    def options(self) -> dict[str, inspect.Parameter]:
        """Keyword options, by name."""
        parameters = inspect.signature(self.function).parameters
        return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True, slots=True)
class Weigher:
    """A rule with its options and its source: what the loss calls.

    source  'prior', 'online', or None for a rule that needs no statistics
    """

    rule: Rule
    source: str | None
    arguments: dict[str, Any]

    def __call__(self, stats: TokenStats, sequence_N: Tensor | None = None) -> Tensor:
        """Detached float32 weights [N], or a scalar where every token weighs the same.

        sequence_N  int64: which sequence each token belongs to, for rules of that scope
        """
        given = (stats, sequence_N) if self.rule.scope == "sequence" else (stats,)
        with torch.no_grad():
            return self.rule.function(*given, **self.arguments).float()


RULES: dict[str, Rule] = {}

METHODS: dict[str, tuple[str, str | None]] = {
    "sft": ("uniform", None),
    "dft": ("prob", "online"),
    "prift-prob": ("prob", "prior"),
    "prift-mass": ("mass", "prior"),
}
"""--method: the rule and the source it stands for."""


def rule(
    name: str, needs: tuple[str, ...], scope: str = "token", signed: bool = False
) -> Callable[[Callable], Callable]:
    """Registers a rule function under `name`. See Rule."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        RULES[name] = Rule(name, needs, function, scope, signed)
        return function

    return register


@rule("uniform", needs=())
def uniform(stats: TokenStats) -> Tensor:
    """w = 1, a scalar: ordinary supervised fine-tuning."""
    return torch.ones(())


@rule("prob", needs=("logprob",))
def prob(stats: TokenStats, *, power: float = 1.0) -> Tensor:
    """w = q(y)^power, in [0, 1].

    From the prior: PriFT-prob (arXiv 2606.09396). From the online model: DFT (arXiv 2508.05629).
    """
    if not 0 <= power < math.inf:
        raise OptionError(f"--rule-arg power={power}: wanted a finite power of 0 or more.")
    return torch.exp(power * stats.logprob) if power else torch.ones_like(stats.logprob)


@rule("mass", needs=("logprob", "log_mass_rank", "n_tie"))
def mass(
    stats: TokenStats,
    *,
    threshold: float = 0.5,
    ties: Literal["paper", "official-code"] = "paper",
) -> Tensor:
    """w = 1 where u >= threshold, else 0: PriFT-mass (arXiv 2606.09396).

    u is the probability mass of all tokens at most as likely as y, y included. With
    ties='official-code' tokens exactly as likely as y do not count, as in the authors' code
    (wang-kee/PriFT, prift_weights.py): u - (n_tie - 1) q(y), taken in float64.
    """
    if not 0.0 <= threshold <= 1.0:
        raise OptionError(f"--rule-arg threshold={threshold}: a probability mass is in [0, 1].")
    if ties == "paper":
        bound = torch.tensor(threshold, dtype=torch.float64).log().float()
        return (stats.log_mass_rank >= bound).float()
    q_N = stats.logprob.double().exp()
    score_N = stats.log_mass_rank.double().exp() - (stats.n_tie.double() - 1) * q_N
    return (score_N >= threshold).float()


def weigher(name: str, source: str | None, arguments: Mapping[str, str]) -> Weigher:
    """The rule `name` with options given as text (`--rule-arg k=v`).

    Raises OptionError for an unknown rule, source or option, or a value of the wrong kind.
    """
    if name not in RULES:
        raise OptionError(f"unknown rule {name!r}. Rules: {', '.join(RULES)}.")
    found = RULES[name]
    if found.needs and source not in SOURCES:
        raise OptionError(f"rule {name} needs --source prior or --source online.")
    options = found.options()
    unknown = [k for k in arguments if k not in options]
    if unknown:
        known = ", ".join(f"{k}={p.default}" for k, p in options.items()) or "none"
        raise OptionError(f"rule {name} has no argument {unknown[0]!r}. It takes: {known}.")
    values = {k: _parse(name, k, v, options[k].annotation) for k, v in arguments.items()}
    bound = Weigher(found, source if found.needs else None, values)
    none = torch.zeros(0)
    bound(TokenStats(**{n: none for n in found.needs}), none.long())  # bad values fail now
    return bound


def _parse(rule_name: str, key: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        wanted = " or ".join(get_args(kind))
    else:
        try:
            return kind(text)
        except ValueError:
            wanted = f"a {kind.__name__}"
    raise OptionError(f"rule {rule_name}: {key}={text} is not {wanted}.")
