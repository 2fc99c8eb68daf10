"""`prift weigh`."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import click

from prift.errors import OptionError

from .command import Command, common, key_values, quiet, say
from .options import data_spec, json_option
from .tables import bar, bars, many, table
from .weighting import prior_weigher, prior_weights, refuse_code_of_file

_SHARES = ("label tokens", "share of tokens", "kept", "mean weight", "share of weight")
_BOUNDS = {"mix": "mix", "min-weight": "least", "max-weight": "most"}
_MOST_ROWS = 20  # there are fewer bins of lengths


@click.command(cls=Command)
@prior_weights
@click.option(
    "--compare",
    multiple=True,
    metavar="R[,K=V]",
    help="Another rule to look at, its options behind commas, as prob,power=2, with mix, "
    "min-weight and max-weight of its own. Repeatable.",
)
@click.option(
    "--thresholds",
    multiple=True,
    metavar="K=V,V...",
    help="Values of an option to compare, as low=0.05,0.1,0.2: what each keeps. Repeatable.  "
    "[default: of every option that decides which tokens are kept]",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="How many of the most and of the least weighted tokens to show.",
)
@json_option
@common
@click.pass_context
def weigh(
    ctx: click.Context,
    json_output: bool,
    compare: tuple[str, ...],
    thresholds: tuple[str, ...],
    **options: Any,
) -> None:
    """Show what a rule would do to the data, before anything is trained.

    How many tokens it keeps, how much they weigh, which they are, and what learning rate makes
    steps as large as SFT's. Takes the data options of prift train, reads the cache alone, and loads
    no model.

    \b
    Example:
      prift weigh --model Qwen/Qwen2.5-1.5B --data train.jsonl --cache prior-cache \\
        --method prift-mass --compare prob
    """
    from prift.preview import PreviewOptions, preview

    allowed = {name: options[name] for name in ("allow_negative", "allow_import")}
    weighers = [prior_weigher(ctx, options)]
    weighers += [_compared(ctx, text, **allowed) for text in compare]
    quiet()
    spec = data_spec(options)
    del options["config"], options["debug"]
    values = {k: v.split(",") for k, v in key_values(thresholds, "--thresholds").items()}
    given = PreviewOptions(spec=spec, weighers=tuple(weighers), thresholds=values, **options)
    found = preview(given, say)
    if json_output:
        click.echo(json.dumps(found))
        return
    _show(found)


def _compared(ctx: click.Context, text: str, allow_negative: bool, allow_import: bool) -> Any:
    """The Weigher of one --compare. Raises OptionError."""
    from prift.methods import weigher

    rule, *pairs = text.split(",")
    refuse_code_of_file(ctx, "compare", rule, allow_import)
    arguments = key_values(tuple(pairs), "--compare")
    bounds = {
        _BOUNDS[name]: _as_number(name, arguments.pop(name))
        for name in list(arguments)
        if name in _BOUNDS
    }
    return weigher(rule, "prior", arguments, **bounds, allow_negative=allow_negative)


def _as_number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"--compare {name}={text}: wanted a number.") from None


def _show(found: dict[str, Any]) -> None:
    click.echo(
        f"{found['examples']:,} examples, {found['label_tokens']:,} of {found['tokens']:,} tokens "
        "are trained\n"
    )
    titles = [_title(one) for one in found["rules"]]
    columns = ("rule", "kept", "mean weight", "effective tokens", "loss", "learning rate")
    rows = [
        (
            title,
            f"{one['kept_share']:.1%}",
            f"{one['mean_weight']:.4f}",
            f"{one['effective_tokens']:,.0f} ({one['effective_share']:.1%})",
            _number(one["loss"], ".4f"),
            _number(one["learning_rate_factor"], ".3g", "x "),
        )
        for title, one in zip(titles, found["rules"], strict=True)
    ]
    table(columns, rows, columns[1:])
    for title, one in zip(titles, found["rules"], strict=True):
        for line in _rule_lines(title, one, found["sft_loss"]):
            click.echo(line)
        for columns, groups in _tables(one):
            click.echo()
            rows = [(*names, *_shares(group)) for names, group in groups[:_MOST_ROWS]]
            table((*columns, *_SHARES), rows, _SHARES)
            if len(groups) > _MOST_ROWS:
                more = many(len(groups) - _MOST_ROWS, columns[-1])
                click.echo(f"and {more} more, which --json shows")
        for name in ("most", "least"):
            if one[name]:
                click.echo(f"\nweigh {name} (equal weights: a random choice)")
            for token in one[name]:
                click.echo(_token(token))
    for one in found["thresholds"]:
        for line in _sweep_lines(one):
            click.echo(line)


def _sweep_lines(one: dict[str, Any]) -> Iterator[str]:
    values = [f"{row['value']:g}" if _is_number(row["value"]) else row["value"]
              for row in one["values"]]  # fmt: skip
    of = "" if one["of"] == one["rule"] else f" of {one['of']}"
    yield f"\n{' '.join([one['rule'], *_pairs(one)])} keeps, by {one['option']}{of}"
    for text, row in zip(values, one["values"], strict=True):
        share, mean = row["kept_share"], row["mean_weight"]
        yield f"  {text.rjust(max(map(len, values)))}  {bar(share)} {share:6.1%}  mean {mean:.4f}"


def _rule_lines(title: str, one: dict[str, Any], sft_loss: float | None) -> Iterator[str]:
    yield f"\n== {title}"
    if one["learning_rate_factor"] is None:
        yield "Its weights sum to nothing that a learning rate could make up for."
    else:
        yield (
            f"Its weights average {one['mean_weight']:.4g}, which scales the gradient. With SGD, "
            f"{one['learning_rate_factor']:.3g} times\nSFT's learning rate gives SFT's step size; "
            "Adam's steps follow a constant factor little."
        )
    if sft_loss and one["loss"]:
        yield (
            f"Under the prior its loss is {one['loss']:.4g}, SFT's {sft_loss:.4g}, "
            f"{sft_loss / one['loss']:.3g} times that. A weighted loss often reads\n10 to 20 times "
            "smaller than SFT's, which is no sign of a better model: compare nll."
        )
    yield from bars("weights", one["histogram"], "tokens")


_Groups = list[tuple[Sequence[str], dict[str, Any]]]


def _tables(one: dict[str, Any]) -> Iterator[tuple[Sequence[str], _Groups]]:
    """(columns, (what stands in them, the group) of each row) of a rule's tables.

    By file are only the datasets that have several: of the others the table would say again what
    the one by dataset says, and that one says nothing where there is one dataset of several files.
    """
    yield ("tokens of a sequence",), [((_span(group),), group) for group in one["lengths"]]
    datasets, files = one["datasets"], one["files"]
    apart = {(group["dataset"], group["file"]) for group in files}
    number = Counter(dataset for dataset, _ in apart)
    some = [group for group in files if number[group["dataset"]] > 1]
    if len(datasets) > 1 or not some:
        yield ("dataset",), [((_plain(group["dataset"]),), group) for group in datasets]
    if some:
        names = ("dataset", "file") if len(datasets) > 1 else ("file",)
        yield names, [(tuple(_plain(group[name]) for name in names), group) for group in some]
    yield ("role",), [((group["role"],), group) for group in one["roles"]]


def _title(one: dict[str, Any]) -> str:
    """Rule and options, as they are asked for."""
    pairs = _pairs(one)
    pairs += [f"mix={one['mix']:g}"] if one["mix"] else []
    bounds = [(name, one[name]) for name in ("min_weight", "max_weight")]
    pairs += [f"{name.replace('_', '-')}={value:g}" for name, value in bounds if value is not None]
    return " ".join([one["rule"], *pairs])


def _pairs(one: dict[str, Any]) -> list[str]:
    return [f"{k}={v}" for arguments in one["arguments"] for k, v in arguments.items()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _span(group: dict[str, Any]) -> str:
    end = group["to"]
    return f"{group['from']:g} and more" if end is None else f"{group['from']:g} to {end - 1:g}"


def _shares(group: dict[str, Any]) -> Sequence[str]:
    return (
        f"{group['label_tokens']:,}",
        f"{group['share_of_tokens']:.1%}",
        _number(group["kept_share"], ".1%"),
        _number(group["mean_weight"], ".4f"),
        _number(group["share_of_weight"], ".1%"),
    )


def _number(value: float | None, form: str, before: str = "") -> str:
    return "none" if value is None else before + format(value, form)


def _token(one: dict[str, Any]) -> str:
    before, token, after = (_plain(one[name]) for name in ("before", "token", "after"))
    return f"  {one['weight']:.4f}  {_plain(one['where'])}  {before}[[{token}]]{after}"


def _plain(text: str) -> str:
    """On one line: escapes for what does not print, and for what the output cannot hold."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or "ascii"
    return shown.encode(encoding, "backslashreplace").decode(encoding)
