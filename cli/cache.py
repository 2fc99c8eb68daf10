"""`prift cache`: what lies in a cache, and whether it is sound."""

import json
from typing import Any

import click

from .command import Group, debug, say
from .options import cache_root

json_option = click.option("--json", "json_output", is_flag=True, help="Print the result as JSON.")


@click.group(cls=Group)
def cache() -> None:
    """Look at a cache, check it, share it."""


@cache.command()
@cache_root
@json_option
@debug
def ls(cache: str, json_output: bool, debug: bool) -> None:
    """List the priors of a cache: model, sequences, tokens, bytes, age.

    Reads footers and keys only, also where the cache is a URL.

    \b
    Example:
      prift cache ls --cache prior-cache
    """
    from prift.inventory import Contents
    from prift.progress import progress
    from prift.remote import open_root

    from .tables import LS, ls_rows, table

    root = open_root(cache)
    priors = root.priors()
    total = sum(len(root.parts(prior)) for prior in priors)
    with progress("reading", total=total, unit="parts") as advance:
        found = [Contents(root, prior, advance).summary() for prior in priors]
    if json_output:
        click.echo(json.dumps({"cache": root.name, "priors": found}))
        return
    if not found:
        click.echo(f"{root.name} holds no prior")
        return
    table(LS, ls_rows(found))
    _say_trouble(found)


@cache.command()
@click.argument("prior", required=False)
@cache_root
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=4_000_000,
    show_default=True,
    metavar="N",
    help="Draw the histograms from so many tokens: whole row groups, spread over the cache.",
)
@json_option
@debug
def info(prior: str | None, cache: str, tokens: int, json_output: bool, debug: bool) -> None:
    """Show one prior: identity, provenance, lengths, coverage, statistics.

    PRIOR is an id or its beginning; it may be left out where the cache holds one prior.

    \b
    Example:
      prift cache info 3f2a --cache prior-cache
    """
    from prift.histograms import describe
    from prift.inventory import Contents, choose
    from prift.progress import progress
    from prift.remote import open_root

    from .tables import info_lines

    root = open_root(cache)
    (chosen,) = choose(root, [prior] if prior else [], one=True)
    contents = Contents(root, chosen)
    size = min(tokens, int(contents.index.tokens.sum()))
    with progress("reading", total=size, unit="tok") as advance:
        found: dict[str, Any] = describe(contents, tokens, advance)
    if json_output:
        click.echo(json.dumps({"cache": root.name, **found}))
        return
    for line in info_lines(found):
        click.echo(line)
    _say_trouble([found])


def _say_trouble(found: list[dict[str, Any]]) -> None:
    for line in [line for one in found for line in one["trouble"]]:
        say(f"left out: {line}")
