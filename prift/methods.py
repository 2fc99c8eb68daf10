"""Weighers by name: what the options --method, --rule and --rule-arg stand for."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import torch

import prift.comparing  # noqa: F401  registers its rules
import prift.rules  # noqa: F401
from prift.errors import OptionError
from prift.roles import ASSISTANT, PROMPT, RESPONSE, USER
from prift.stats import TokenStats
from prift.weigher import RULES, SOURCES, Factor, Rule, Weigher

METHODS: dict[str, tuple[str, str | None]] = {
    "sft": ("uniform", None),
    "dft": ("prob", "online"),
    "prift-prob": ("prob", "prior"),
    "prift-mass": ("mass", "prior"),
}
"""--method: the rule and the source it stands for."""


def weigher(
    name: str,
    source: str | None,
    arguments: Mapping[str, str],
    *,
    mix: float = 0.0,
    least: float | None = None,
    most: float | None = None,
    allow_negative: bool = False,
) -> Weigher:
    """The rule `name` with options given as text (`--rule-arg k=v`).

    name            of a rule; of several, 'prob*focal', whose weights are multiplied; or
                    'package.module:function', a rule function of the caller's own
    arguments       options of the rules; of one of several, 'prob.power' where more than one has it
    mix, least, most  see Weigher
    allow_negative  whether a rule whose weights may be negative is wanted

    Raises OptionError for an unknown rule, source or option, or a value of the wrong kind.
    """
    rules = [_rule(word) for word in name.split("*")]
    twice = [rule.name for i, rule in enumerate(rules) if rule in rules[:i]]
    if twice:
        raise OptionError(f"--rule {name} names {twice[0]} twice.")
    needed = any(found.needs for found in rules)
    if needed and source not in SOURCES:
        raise OptionError(f"rule {name} needs --source prior or --source online.")
    factors = _factors(rules, arguments)
    if not 0 <= mix <= 1:
        raise OptionError(f"--mix {mix}: a share is in [0, 1].")
    for option, bound in (("--min-weight", least), ("--max-weight", most)):
        if bound is not None and not math.isfinite(bound):
            raise OptionError(f"{option} {bound} is not a finite weight.")
    if least is not None and most is not None and least > most:
        raise OptionError(f"--min-weight {least} is above --max-weight {most}.")
    bound = Weigher(factors, source if needed else None, mix, least, most)
    if bound.signed and not allow_negative:
        raise OptionError(
            f"rule {name} may give negative weights, which push tokens away. Where that is meant, "
            "add --allow-negative; or bound them with --min-weight 0."
        )
    check(bound)
    return bound


def check(bound: Weigher) -> None:
    """Values out of range, and rules that do not work, fail now. Raises OptionError."""
    tokens = {
        "logprob": torch.tensor([-0.1, -1.0, -2.0, -5.0]),
        "log_mass_rank": torch.tensor([0.0, -0.8, -1.0, -4.0]),
        "rank": torch.tensor([1, 2, 3, 50], dtype=torch.int32),
        "n_tie": torch.tensor([1, 1, 2, 1], dtype=torch.int32),
        "entropy": torch.tensor([0.4, 1.5, 2.0, 3.0]),
        "collision": torch.tensor([0.8, 0.3, 0.2, 0.1]),
        "expected_rank": torch.tensor([1.2, 3.0, 6.0, 80.0]),
        "entropy_top20": torch.tensor([0.4, 1.4, 1.9, 2.6]),
    }
    stats, base = (
        TokenStats(**{n: tokens[n] for n in names}) for names in (bound.needs, bound.base)
    )
    try:
        roles = torch.tensor([PROMPT, RESPONSE, USER, ASSISTANT], dtype=torch.uint8)
        weights = bound(stats, torch.tensor([0, 0, 1, 1]), base, roles)
        weights.expand(4)
    except OptionError:
        raise
    except Exception as error:  # a rule may be anybody's code
        raise OptionError(
            f"rule {bound.name} fails on four ordinary tokens: {type(error).__name__}: {error}"
        ) from error


def _rule(name: str) -> Rule:
    module, colon, function = name.partition(":")
    if colon:
        return _imported(module, function)
    if name not in RULES:
        raise OptionError(f"unknown rule {name!r}. Rules: {', '.join(RULES)}.")
    return RULES[name]


def _imported(module: str, function: str) -> Rule:
    """A rule of the caller's own code."""
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        raise OptionError(
            f"--rule {module}:{function} cannot be imported: {error}. Python looks for it in what "
            "is installed, and in the folders that PYTHONPATH names: PYTHONPATH=. prift train ..."
        ) from error
    if not isinstance(getattr(found, "rule", None), Rule):
        raise OptionError(
            f"--rule {module}:{function} is no rule: put @prift.weigher.rule(name, needs=...) on "
            "it."
        )
    return replace(found.rule, name=f"{module}:{function}")


def _factors(rules: list[Rule], arguments: Mapping[str, str]) -> tuple[Factor, ...]:
    values: list[dict[str, Any]] = [{} for _ in rules]
    for key, text in arguments.items():
        owner, dot, option = key.rpartition(".")
        owners = [
            i
            for i, found in enumerate(rules)
            if option in found.options() and (not dot or found.name == owner)
        ]
        if not owners:
            raise OptionError(_unknown(rules, key))
        if len(owners) > 1:
            both = " and ".join(rules[i].name for i in owners)
            raise OptionError(f"{both} both have {key!r}: say {rules[owners[0]].name}.{key}=...")
        found = rules[owners[0]]
        values[owners[0]][option] = parse(found, option, text)
    return tuple(Factor(found, own) for found, own in zip(rules, values, strict=True))


def _unknown(rules: list[Rule], key: str) -> str:
    lines = []
    for found in rules:
        known = ", ".join(f"{k}={p.default}" for k, p in found.options().items()) or "none"
        lines.append(f"rule {found.name} has no argument {key!r}. It takes: {known}.")
    return "\n".join(lines)


def parse(rule: Rule, key: str, text: str) -> Any:
    """The value that text gives an option. Raises OptionError for one of the wrong kind."""
    parameter = rule.options()[key]
    plain = parameter.annotation is parameter.empty
    kind = type(parameter.default) if plain else parameter.annotation
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        wanted = " or ".join(get_args(kind))
    elif kind is bool:
        if text in ("true", "false"):
            return text == "true"
        wanted = "true or false"
    else:
        try:
            return kind(text)
        except (ValueError, TypeError, OverflowError):
            wanted = f"a {kind.__name__}"
    raise OptionError(f"rule {rule.name}: {key}={text} is not {wanted}.")
