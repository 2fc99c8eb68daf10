"""What a weighting rule is, and rules with their options: what turns statistics into weights.

A rule sees flat label tokens [N]: no padding, no mask, no shift. It does not know whether its
statistics come from the frozen prior or from the model in training: that is `--source`, and it
makes DFT and PriFT-prob the same rule.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prift.errors import OptionError
from prift.stats import TokenStats

SOURCES = ("prior", "online")
SCOPES = ("token", "sequence", "batch")
GIVEN = ("stats", "base", "sequence_N", "role_N")
"""What a rule may look at, by the names of its parameters."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: a function whose positional parameters say what it looks at, and whose keyword-only
    parameters are its options.

    name      as given to --rule
    needs     statistics it reads of the source
    function  (stats, [base], [sequence_N], [role_N], *, options) -> weights float32 [N], or a
              scalar where every token weighs the same
    scope     what one weight depends on: 'token', that token's statistics; 'sequence', those of
              its sequence's label tokens; 'batch', those of all tokens it is given
    signed    whether its weights may be negative
    base      statistics it reads of a second distribution: the prior's where the source is the
              model in training, the second prior's where it is the first
    cuts      options that decide which tokens have a weight at all, with values to compare

    stats, base  TokenStats of N tokens; sequence_N  int64: which sequence each belongs to;
    role_N  uint8: whose words each is, codes of prift.roles
    """

    name: str
    needs: tuple[str, ...]
    function: Callable[..., Tensor]
    scope: str = "token"
    signed: bool = False
    base: tuple[str, ...] = ()
    cuts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {f.name for f in fields(TokenStats)}
        odd = [n for n in (*self.needs, *self.base) if n not in known]
        if odd:
            raise OptionError(
                f"rule {self.name} reads {odd[0]!r}, which is no statistic. There are: "
                f"{', '.join(f.name for f in fields(TokenStats))}."
            )
        if self.scope not in SCOPES:
            raise OptionError(
                f"rule {self.name} has the scope {self.scope!r}. There are: {', '.join(SCOPES)}."
            )
        if self.base and not self.needs:
            raise OptionError(f"rule {self.name} compares with a base and reads nothing else.")
        odd = [n for n in self.given() if n not in GIVEN]
        odd += [n for n, p in self.options().items() if p.default is p.empty]
        if odd:
            raise OptionError(
                f"rule {self.name} takes {odd[0]!r}: a rule is given stats, base, sequence_N and "
                "role_N, and all else is an option behind a *, with a default."
            )

    def options(self) -> dict[str, inspect.Parameter]:
        """Keyword options, by name."""
        parameters = inspect.signature(self.function, eval_str=True).parameters
        return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def given(self) -> list[str]:
        """Names of what it is given, in order: some of GIVEN."""
        parameters = inspect.signature(self.function).parameters
        return [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


@dataclass(frozen=True, slots=True)
class Factor:
    """A rule and the values of its options."""

    rule: Rule
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Weigher:
    """Rules with their options and their source: what gives each token its weight.

    factors      their weights are multiplied
    source       'prior', 'online', or None where no rule reads any statistics
    mix          then (1 - mix) * w + mix: a share of plain SFT
    least, most  then no less and no more than these
    """

    factors: tuple[Factor, ...]
    source: str | None
    mix: float = 0.0
    least: float | None = None
    most: float | None = None

    @staticmethod
    def of(rule: Rule, source: str | None, **arguments: Any) -> "Weigher":
        """One rule alone."""
        return Weigher((Factor(rule, arguments),), source)

    @property
    def name(self) -> str:
        """Of the rules: 'prob', 'prob*focal'."""
        return "*".join(factor.rule.name for factor in self.factors)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics it reads of the source."""
        return tuple(dict.fromkeys(n for f in self.factors for n in f.rule.needs))

    @property
    def base(self) -> tuple[str, ...]:
        """Statistics it reads of the second distribution; none where it looks at one alone."""
        return tuple(dict.fromkeys(n for f in self.factors for n in f.rule.base))

    @property
    def known(self) -> bool:
        """Whether its weights are known before training."""
        return self.source != "online"

    @property
    def by_role(self) -> bool:
        """Whether it asks whose words a token is."""
        return any("role_N" in factor.rule.given() for factor in self.factors)

    @property
    def scope(self) -> str:
        """The widest of its rules'."""
        return max((factor.rule.scope for factor in self.factors), key=SCOPES.index)

    @property
    def code(self) -> str:
        """What decides its weights, the same text in every process: rules, options, source code and
        that of what stands beside it."""
        rules = [[f.rule.name, sorted(f.arguments.items()), _code(f.rule)] for f in self.factors]
        return repr([rules, self.source, self.mix, self.least, self.most])

    @property
    def signed(self) -> bool:
        """Whether its weights may be negative."""
        negative = self.least is None or self.least < 0
        return negative and any(factor.rule.signed for factor in self.factors)

    def __call__(
        self,
        stats: TokenStats,
        sequence_N: Tensor | None = None,
        base: TokenStats | None = None,
        role_N: Tensor | None = None,
    ) -> Tensor:
        """Detached float32 weights [N], or a scalar where every token weighs the same. See Rule."""
        given = {"stats": stats, "base": base, "sequence_N": sequence_N, "role_N": role_N}
        present = [getattr(stats, name) for name in stats.names()]
        if self.by_role and role_N is None:
            raise OptionError(f"rule {self.name} asks whose words each token is: pass role_N")
        present += [role_N] if self.by_role else []
        device = present[0].device if present else None
        if present and not len(present[0]):
            return torch.zeros(0, device=device)  # a micro-batch without a label token
        weights = torch.ones((), device=device)
        with torch.no_grad():
            for factor in self.factors:
                seen = [given[name] for name in factor.rule.given()]
                found = factor.rule.function(*seen, **factor.arguments).float()
                weights = weights * (found.to(device) if device else found)
            if self.mix:
                weights = (1 - self.mix) * weights + self.mix
            if (self.least, self.most) != (None, None):
                weights = weights.clamp(self.least, self.most)
            return weights


def _code(rule: Rule) -> str:
    """Its own source, and a digest of the files that it may call into."""
    try:
        own = inspect.getsource(rule.function)
        file = inspect.getsourcefile(rule.function)
    except (OSError, TypeError):  # made without a file
        return rule.function.__code__.co_code.hex()
    ours = rule.function.__module__.startswith("prift.")
    beside = [Path(__file__).with_name(name) for name in _OF_OURS] if ours else [Path(file)]
    return f"{own} {hashlib.sha256(b''.join(one.read_bytes() for one in beside)).hexdigest()}"


_OF_OURS = ("rules.py", "comparing.py", "roles.py")

RULES: dict[str, Rule] = {}


def rule(
    name: str,
    needs: tuple[str, ...],
    scope: str = "token",
    signed: bool = False,
    base: tuple[str, ...] = (),
    cuts: Mapping[str, tuple[float, ...]] | None = None,
) -> Callable[[Callable], Callable]:
    """Makes a function a rule, as its attribute `rule`. See Rule. prift's own are known by `name`,
    any other by its import path alone."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        function.rule = Rule(name, needs, function, scope, signed, base, cuts or {})
        if function.__module__.startswith("prift."):
            RULES[name] = function.rule
        return function

    return register
