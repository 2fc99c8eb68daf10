"""`prift cache compact`, `copy` and `gc`: what changes the files of a cache."""

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cache import cache
from .command import debug, quiet, say
from .options import TEXT_OPTIONS, cache_root, data_options, data_spec, json_option
from .tables import size

if TYPE_CHECKING:
    from prift.store.gc import Examined, Use

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType):
    """90, 90s, 10m, 2h, 1d: seconds, as a float."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", str(value))
        if not found:
            self.fail(f"{value!r} is no duration; wanted 90s, 10m, 2h or 0", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


grace_option = click.option(
    "--grace",
    type=Duration(),
    default="5m",
    show_default=True,
    metavar="TIME",
    help="How long old parts stay beside the new ones, so that running readers finish: 90s, 10m, "
    "2h; 0 where nobody reads.",
)


@cache.command()
@click.argument("priors", nargs=-1, metavar="[PRIOR]...")
@cache_root
@grace_option
@json_option
@debug
def compact(
    priors: tuple[str, ...], cache: str, grace: float, json_output: bool, debug: bool
) -> None:
    """Merge many small parts into few; readers get the same bits as before.

    PRIOR is an id or its beginning; all priors by default. May run while others read and write, and
    be stopped at any time: running it again finishes.

    \b
    Example:
      prift cache compact --cache prior-cache
    """
    from dataclasses import asdict

    from prift.store.compact import compact as run
    from prift.store.remote import open_root

    root = open_root(cache)
    done = run(root, priors, grace, say=say)
    if json_output:
        click.echo(json.dumps({"cache": root.name, "priors": [asdict(one) for one in done]}))
        return
    for one in done:
        if not one.merged:
            click.echo(f"{one.prior}: nothing to merge in {one.parts} parts")
            continue
        click.echo(
            f"{one.prior}: {one.merged} of {one.parts} parts ({size(one.merged_bytes)}) became "
            f"{one.made} ({size(one.made_bytes)}); {one.duplicates:,} duplicate rows left out"
        )
        if one.left:
            click.echo(
                f"{one.prior}: {one.left} old parts stay, since others wrote or compacted in "
                "between; run the same command again"
            )


@cache.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--prior",
    multiple=True,
    metavar="ID",
    help="Only this one. Repeatable.  [default: all]",
)
@json_option
@debug
def copy(source: str, target: str, prior: tuple[str, ...], json_output: bool, debug: bool) -> None:
    """Copy parts from one cache to another: what DST lacks, each verified by its hash.

    SRC and DST are folders or URLs. Run it again to go on where it stopped. A damaged part is named
    and left out.

    \b
    Example:
      prift cache copy prior-cache s3://team/prior-cache
    """
    from dataclasses import asdict

    from prift.errors import CacheError
    from prift.store.copying import copy as run
    from prift.store.remote import open_root

    here, there = open_root(source), open_root(target)
    done = run(here, there, prior)
    if json_output:
        found = {"source": here.name, "target": there.name, "priors": [asdict(one) for one in done]}
        click.echo(json.dumps(found))
    else:
        for one in done:
            click.echo(
                f"{one.prior}: {one.copied} parts copied ({size(one.copied_bytes)}); "
                f"{one.there} of {one.parts} were there"
            )
    if damaged := [said for one in done for said in one.damaged]:
        raise CacheError("\n".join([f"{len(damaged)} parts were not copied:", *damaged]))


@cache.command()
@click.option("--model", metavar="M", help="The model whose tokenizer makes the sequences.")
@partial(data_options, required=False)
@click.option(
    "--prior",
    metavar="ID|MODEL",
    help="The prior that these data use.  [default: all those of --model]",
)
@click.option(
    "--run",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="RUN.YAML",
    help="Also what this run uses: a --config file, or the prift.yaml of an output folder. "
    "Repeatable.",
)
@cache_root
@click.option("--other-priors", is_flag=True, help="Also delete priors that no data here use.")
@click.option("--delete", is_flag=True, help="Delete, rather than say what would be deleted.")
@click.option(
    "--rewrite",
    is_flag=True,
    help="With --delete: also make parts that are used in part anew, without the other rows.",
)
@grace_option
@json_option
@debug
def gc(json_output: bool, debug: bool, **options: Any) -> None:
    """Find what no listed data use, and delete it with --delete.

    A row is in use where its token ids are a sequence of the data. Parts without any row in use go.
    List everything that is to stay: all data, evaluation data too, with the options that
    they were scored with; data with other options come from --run files.

    \b
    Example:
      prift cache gc --cache prior-cache --model Qwen/Qwen2.5-1.5B --data train.jsonl
    """
    from prift.store.gc import examine, rewrite, sweep
    from prift.store.remote import open_root

    quiet()
    root = open_root(options["cache"])
    found = examine(root, _uses(options))
    if options["delete"]:
        sweep(root, found, options["other_priors"])
    anew = 0
    if options["delete"] and options["rewrite"]:
        anew = rewrite(root, found, options["grace"], say)
    if json_output:
        priors = [one.plain() for one in found]
        told = {"cache": root.name, "deleted": options["delete"], "rewritten": anew}
        click.echo(json.dumps({**told, "priors": priors}))
        return
    for one in found:
        click.echo(_told(one, options["delete"], options["other_priors"]))
    if anew:
        click.echo(f"{anew} parts were made anew without the rows that are not used")
    if not options["delete"]:
        click.echo("nothing was deleted: add --delete to the same command")


def _uses(options: dict[str, Any]) -> "list[Use]":
    """What the options and the --run files list."""
    from prift.errors import OptionError
    from prift.store.gc import Use

    uses = [use for path in options["run"] for use in _uses_of(path)]
    if options["limit"]:
        raise OptionError("--limit: rows that are not read would seem unused; leave it out")
    if options["data"] and options["model"]:
        uses.append(Use(options["model"], data_spec(options), options["prior"]))
    elif options["data"] or options["model"] or not uses:
        raise OptionError("name what is to stay: --model and --data, or --run")
    return uses


def _uses_of(path: str) -> "list[Use]":
    """The data of a --config file of `prift precompute` or `prift train`. Raises OptionError."""
    from dataclasses import replace

    import yaml

    from prift.errors import OptionError
    from prift.store.gc import Use

    try:
        text = Path(path).read_text()
        given, written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
        given = {str(name).replace("-", "_"): value for name, value in given.items()}
    except (yaml.YAMLError, OSError, UnicodeDecodeError, AttributeError) as error:
        raise OptionError(f"--run {path}: {error}") from error
    if not given.get("model") or not given.get("data"):
        raise OptionError(f"--run {path}: it names no model or no data")
    names = (*TEXT_OPTIONS, "tokenizer", "chat_template", "trust_remote_code")
    values = {name: given.get(name) for name in names} | {"limit": None, "data_weight": ()}
    for name, usual in (("format", "auto"), ("labels", "responses"), ("on_empty", "drop")):
        values[name] = given.get(name) or usual
    spec = data_spec({**values, "data": _listed(given["data"])})
    # As written: an id of digits alone would be a number.
    priors = _listed(written["prior"]) if given.get("prior") not in (None, []) else (None,)
    uses = [Use(str(given["model"]), spec, prior) for prior in priors]
    if given.get("eval_data"):
        chosen = replace(spec.text, split=given.get("eval_split"))
        other = replace(spec, data=_listed(given["eval_data"]), text=chosen)
        uses += [replace(use, spec=other) for use in uses]
    return uses


def _listed(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _told(one: "Examined", deleted: bool, others: bool) -> str:
    gone = "deleted" if deleted else "would go"
    if not one.named:
        stays = gone if others else "stays; --other-priors takes it away"
        return f"{one.prior}: used by no data here: {one.parts} parts, {size(one.bytes)}: {stays}"
    line = (
        f"{one.prior}: {one.found:,} of {one.sequences:,} sequences have a row; "
        f"{len(one.unused)} of {one.parts} parts unused: {one.unused_rows:,} of {one.rows:,} rows, "
        f"{size(one.unused_bytes)} of {size(one.bytes)} {gone}"
    )
    if one.mixed_rows:
        line += f"; {len(one.mixed)} parts are used in part, {one.mixed_rows:,} rows of them not"
    return line
