"""What every command does at its edge: errors, signals, `--debug` and `--config`."""

import sys
from collections.abc import Callable
from typing import Any

import click

from prift.errors import Interrupted, OptionError, PriftError

TRAINING = "training"
"""Key of a config file whose mapping holds TrainingArguments."""


class Command(click.Command):
    """A click command that turns the library's errors into exit code 1 without a traceback.

    Ctrl-C exits with 130, SIGTERM, where it is heard, with 143. `--debug` shows the traceback.
    """

    config_keys: tuple[str, ...] = ()

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as stop:
            say(str(stop))
            ctx.exit(128 + stop.signal)
        except PriftError as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("interrupted; what was finished is kept", err=True)
            ctx.exit(130)


class Group(click.Group):
    """A click group of such commands."""

    command_class = Command


debug = click.option(
    "--debug", is_flag=True, help="Show the traceback of an error instead of its message."
)


def common(function: Callable) -> Callable:
    """--config and --debug."""
    function = debug(function)
    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False),
        is_eager=True,
        callback=_read_config,
        metavar="RUN.YAML",
        help="YAML file that sets any of these options by name; the command line wins.",
    )(function)


def _read_config(ctx: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Fills the command's defaults from the file; refuses keys that are no option of it."""
    if path is None:
        return None
    import yaml

    try:
        with open(path) as file:
            values = yaml.safe_load(file) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise click.ClickException(f"--config {path}: wanted a mapping of options to values")
    values = {str(k).replace("-", "_"): v for k, v in values.items() if v is not None}
    apart = ("config", "training_flags", "allow_import")  # a file does not allow itself anything
    known = {p.name: p for p in ctx.command.params if p.name not in apart}
    if TRAINING in ctx.command.config_keys:
        ctx.obj = values.pop(TRAINING, {})
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise click.ClickException(
            f"--config {path}: unknown key {unknown[0]!r}. Known: {', '.join(sorted(known))}"
            + "".join(f"; TrainingArguments go below {k}:" for k in ctx.command.config_keys)
        )
    for name, value in values.items():
        values[name] = _as_typed(value, known[name], f"--config {path}: {name}")
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _as_typed(value: Any, option: click.Parameter, place: str) -> Any:
    """The value as the command line would have it: text, or a list of texts."""
    listed = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not option.multiple:
        raise click.ClickException(f"{place}: found a list; wanted a single value")
    for one in listed:
        if not isinstance(one, (str, int, float)):
            raise click.ClickException(f"{place}: found {one!r}; wanted text, a number or a flag")
    texts = [str(one) for one in listed]
    return texts if option.multiple else texts[0]


def resolved(ctx: click.Context) -> dict[str, Any]:
    """All options that have a value, by name: itself a valid --config."""
    skip = {"config", "debug", "json_output", "training_flags", "resume", "allow_import"}
    given = {k: v for k, v in ctx.params.items() if k not in skip}
    values = {k: v for k, v in given.items() if v is not None and v is not False and v != ()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def say(line: str) -> None:
    """One line for people, on stderr; said once in a distributed run."""
    import os

    if os.environ.get("RANK", "0") == "0":
        click.echo(line, err=True)


def key_values(pairs: tuple[str, ...], option: str) -> dict[str, str]:
    """'k=v' strings as a mapping. Raises OptionError."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionError(f"{option} {pair}: wanted name=value")
        found[key.strip()] = value
    return found


def quiet() -> None:
    """Keeps transformers' own bars and advice off a stderr that nobody watches."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
