"""`prift rules`."""

import json
from typing import Any

import click

from prift.errors import OptionError

from .command import Command, debug
from .options import json_option
from .tables import table


@click.command(cls=Command)
@click.argument("name", required=False)
@json_option
@debug
def rules(name: str | None, json_output: bool, debug: bool) -> None:
    """List the weighting rules: what each reads, and what one weight depends on; and presets.

    With a NAME, that rule's formula, options and source, or what that preset stands for.
    docs/methods.md says more.

    \b
    Example:
      prift rules mass
    """
    from prift.methods import METHODS
    from prift.presets import PRESETS
    from prift.weigher import RULES

    if name in PRESETS:
        _show_preset(name, PRESETS[name], json_output)
        return
    if name is not None and name not in RULES:
        known = f"Rules: {', '.join(RULES)}. Presets: {', '.join(PRESETS)}."
        raise OptionError(f"unknown rule {name!r}. {known}")
    found = [_described(RULES[n], METHODS) for n in RULES if name in (None, n)]
    if json_output:
        click.echo(json.dumps(found))
    elif name is None:
        columns = ("rule", "reads", "scope", "options", "method")
        table(columns, [[_shown(one[column]) for column in columns] for one in found])
        click.echo("\nreads: statistics of the source, / those of the distribution compared with\n")
        rows = [[n, *_stands_for(one).values()] for n, one in PRESETS.items()]
        table(("preset", *_stands_for(next(iter(PRESETS.values())))), rows)
    else:
        click.echo(f"{name}: {found[0]['formula']}\n")
        for key in ("reads", "scope", "options", "method", "preset"):
            click.echo(f"{key.ljust(8)} {_shown(found[0][key]) or 'none'}")


def _stands_for(preset: Any) -> dict[str, str]:
    return {
        "rule": preset.rule,
        "source": preset.source,
        "options": _shown(dict(preset.arguments)),
        "normalize": preset.normalize,
        "as in": f"{preset.program} ({preset.version})",
    }


def _show_preset(name: str, preset: Any, json_output: bool) -> None:
    if json_output:
        click.echo(json.dumps({"preset": name, **_stands_for(preset), "options": preset.arguments}))
        return
    click.echo(f"{name}: what --preset {name} stands for\n")
    rows = {**_stands_for(preset), "takes": ", ".join(preset.leaves)}
    for key, text in rows.items():
        click.echo(f"{key.ljust(9)} {text or 'none'}")


def _described(rule: Any, methods: dict[str, tuple[str, str | None]]) -> dict[str, Any]:
    import inspect

    from prift.presets import PRESETS
    from prift.stats import EXTENDED

    reads = ", ".join([*rule.needs, *(["roles"] if "role_N" in rule.given() else [])])
    reads += f" / {', '.join(rule.base)}" if rule.base else ""
    return {
        "rule": rule.name,
        "reads": reads,
        "scope": rule.scope,
        "options": {k: p.default for k, p in rule.options().items()},
        "method": [m for m, (own, _) in methods.items() if own == rule.name],
        "preset": [n for n, one in PRESETS.items() if one.rule == rule.name],
        "statistics": "extended" if {*rule.needs, *rule.base} & {*EXTENDED} else "core",
        "signed": rule.signed,
        "formula": inspect.getdoc(rule.function),
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(value) if isinstance(value, list) else value
