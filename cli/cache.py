"""`prift cache`: what lies in a cache, and whether it is sound."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from .command import Group, debug, quiet, say
from .options import cache_root, data_options, data_spec, json_option
from .tables import LS, info_lines, ls_rows, table, verified_lines


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
    from prift.progress import progress
    from prift.store.inventory import Contents
    from prift.store.remote import open_root

    root = open_root(cache)
    priors = root.priors()
    with progress("reading", total=len(priors), unit="priors") as advance:
        found = []
        for prior in priors:
            found.append(Contents(root, prior).summary())
            advance(1)
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
    from prift.progress import progress
    from prift.store.histograms import describe
    from prift.store.inventory import Contents, choose
    from prift.store.remote import open_root

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


@cache.command()
@click.argument("priors", nargs=-1, metavar="[PRIOR]...")
@cache_root
@click.option(
    "--deep",
    is_flag=True,
    help="Also score a sample of the --data again with --model, and compare.",
)
@click.option(
    "--model",
    metavar="M",
    help="The prior's model; without --deep it only tells how large the vocabulary is.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Sequences that --deep scores again.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Which ones are taken."
)
@partial(data_options, required=False)
@json_option
@debug
@click.pass_context
def verify(
    ctx: click.Context,
    priors: tuple[str, ...],
    cache: str,
    deep: bool,
    model: str | None,
    sample: int,
    seed: int,
    json_output: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Check every byte of a cache: hashes, schema, spans, ranges, columns against each other.

    PRIOR is an id or its beginning; all priors where none is named. Exits with 1 where anything is
    wrong, and says what mends it. That the numbers are those of the model is checked by --deep,
    which takes the data options of prift precompute: keys are hashes, and cannot be scored.

    \b
    Example:
      prift cache verify --cache prior-cache
    """
    from prift.progress import progress
    from prift.store.inventory import choose
    from prift.store.problems import lines
    from prift.store.remote import open_root
    from prift.store.verify import size_of
    from prift.store.verify import verify as run

    if deep and not (model and options["data"]):
        raise click.UsageError("--deep scores --data again with --model: both are needed")
    if options["data"] and not deep:
        raise click.UsageError("--data is for --deep")
    root = open_root(cache)
    chosen = choose(root, priors)
    vocabulary = _vocabulary(model, options["trust_remote_code"]) if model else None
    with progress("checking", total=size_of(root, chosen), unit="B") as advance:
        found = run(root, chosen, vocabulary, advance, whole=not priors)
    if deep:
        from prift.deepcheck import deepen

        quiet()
        with progress("scoring", total=sample, unit="sequences") as advance:
            deepen(root, chosen, model, data_spec(options), found, sample, seed, say, advance)
    if json_output:
        click.echo(json.dumps({"cache": root.name, **found.plain()}))
    else:
        for line in (*lines(found), *verified_lines(found)):
            click.echo(line)
    if found.problems:
        ctx.exit(1)


def _vocabulary(model: str, trust_remote_code: bool) -> Callable[[Any], int | None]:
    """Tells V for the priors that are this model's."""
    from prift.identity import config_digest
    from prift.models import load_config, locate, vocabulary_size

    quiet()
    folder = locate(model, trust_remote_code=trust_remote_code)
    config = load_config(folder, trust_remote_code)
    digest, size = config_digest(config), vocabulary_size(config)
    return lambda identity: size if identity and identity.config == digest else None


def _say_trouble(found: list[dict[str, Any]]) -> None:
    for line in [line for one in found for line in one["trouble"]]:
        say(f"left out: {line}")
