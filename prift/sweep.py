"""How what a rule keeps moves with one of its options: what `prift weigh` charts.

All else of the rule stays, but shares of plain SFT and least weights, which come behind it and
would keep every token, are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prift.errors import OptionError
from prift.methods import check, parse
from prift.weigher import Factor, Weigher


@dataclass(frozen=True)
class Sweep:
    """Rules that differ in one option's value alone.

    number   of the factor whose option it is
    weighers  one for each value, in order
    """

    number: int
    option: str
    values: tuple[Any, ...]
    weighers: tuple[Weigher, ...]

    @property
    def rule(self) -> str:
        """Whose option it is."""
        return self.weighers[0].factors[self.number].rule.name


def sweeps(weighers: Sequence[Weigher], asked: Mapping[str, Sequence[str]]) -> list[Sweep]:
    """One for each option of these that decides which tokens are kept (Rule.cuts), or is asked
    for; equal ones once. A rule's own values are joined by the one given.

    asked  option -> values as text, in place of the rule's own

    Raises OptionError for an option asked for that none of them has, and for values that its rule
    refuses.
    """
    found: dict[tuple[str, str], Sweep] = {}
    unknown = set(asked)
    for one in weighers:
        bare = replace(one, mix=0.0, least=None)
        for number, factor in enumerate(one.factors):
            unknown -= set(factor.rule.options())
            for option in factor.rule.options():
                chart = option, _with(bare, number, option).code
                if chart in found or option not in {*asked, *factor.rule.cuts}:
                    continue
                texts = asked.get(option)
                if texts is None:
                    pairs = _usual(bare, number, option)
                else:
                    pairs = _asked(bare, number, option, texts)
                if pairs:
                    values, own = zip(*pairs, strict=True)
                    found[chart] = Sweep(number, option, values, own)
    if unknown:
        names = ", ".join(one.name for one in weighers)
        raise OptionError(f"--thresholds {min(unknown)}: {names} has no such option.")
    return list(found.values())


def _asked(
    bare: Weigher, number: int, option: str, texts: Sequence[str]
) -> list[tuple[Any, Weigher]]:
    values = [parse(bare.factors[number].rule, option, text) for text in texts]
    pairs = [(value, _with(bare, number, option, value)) for value in values]
    for _, one in pairs:
        check(one)
    return pairs


def _usual(bare: Weigher, number: int, option: str) -> list[tuple[Any, Weigher]]:
    """The rule's own values, and the one given; not those that do not go with its other options."""
    rule, arguments = bare.factors[number].rule, bare.factors[number].arguments
    given = arguments.get(option, rule.options()[option].default)
    found = []
    for value in sorted({*rule.cuts[option], *([given] if np.isfinite(given) else [])}):
        one = _with(bare, number, option, value)
        try:
            check(one)
        except OptionError:
            continue
        found.append((value, one))
    return found


def _with(weigher: Weigher, number: int, option: str, value: Any = None) -> Weigher:
    """The weigher with this option at the value; None: left to its default."""
    factors, factor = list(weigher.factors), weigher.factors[number]
    arguments = {name: own for name, own in factor.arguments.items() if name != option}
    arguments |= {} if value is None else {option: value}
    factors[number] = Factor(factor.rule, arguments)
    return replace(weigher, factors=tuple(factors))
