"""`prift cache export`."""

import json
from typing import Any

import click

from prift.errors import OptionError

from .command import Command, common, key_values, quiet, say
from .options import cache_root, data_options, data_spec

_METHODS = ["sft", "prift-prob", "prift-mass"]


@click.command(cls=Command)
@click.option(
    "--model",
    required=True,
    metavar="M",
    help="Model to be trained: its tokenizer makes the ids, and its prior is read.",
)
@data_options
@cache_root
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    help="A rule by the name papers use, with the prior as its source.",
)
@click.option("--rule", metavar="R", help="Weighting rule (docs/methods.md); reads the prior.")
@click.option(
    "--rule-arg", multiple=True, metavar="K=V", help="Option of the rule, as threshold=0.5."
)
@click.option(
    "--ties",
    type=click.Choice(["paper", "official-code"]),
    help="How mass counts tokens exactly as likely as the target.  [default: paper]",
)
@click.option(
    "--prior",
    metavar="MODEL|ID",
    help="Which prior of the cache to read.  [default: the only one of --model]",
)
@click.option(
    "--column",
    "statistics",
    multiple=True,
    metavar="NAME",
    help="Also write this statistic of the prior, as logprob. Repeatable.",
)
@click.option(
    "--output",
    required=True,
    metavar="FILE",
    help="Where to: a file that ends in .parquet or .jsonl. One that is there is replaced.",
)
@click.option("--json", "json_output", is_flag=True, help="Print the result as JSON.")
@common
def export(
    json_output: bool,
    method: str | None,
    rule: str | None,
    rule_arg: tuple[str, ...],
    ties: str | None,
    **options: Any,
) -> None:
    """Write a data set's tokens with a rule's weights, for other trainers to read.

    Columns: input_ids, labels (-100 where not trained), weights. Takes the data options of prift
    train, reads the cache alone, and loads no model.

    \b
    Example:
      prift cache export --model Qwen/Qwen2.5-1.5B --data train.jsonl --cache prior-cache \\
        --method prift-mass --output weighted.parquet
    """
    if (method is None) == (rule is None):
        raise OptionError("choose one of --method NAME or --rule NAME.")
    from dataclasses import asdict

    from prift.export import ExportOptions
    from prift.export import export as run
    from prift.methods import METHODS, weigher

    arguments = key_values(rule_arg, "--rule-arg")
    if ties and "ties" in arguments:
        raise OptionError("--ties and --rule-arg ties= say the same thing: give one of them.")
    if ties:
        arguments["ties"] = ties
    chosen = weigher(METHODS[method][0] if method else rule, "prior", arguments)
    quiet()
    spec = data_spec(options)
    del options["config"], options["debug"]
    result = run(ExportOptions(spec=spec, weigher=chosen, **options), say)
    if json_output:
        click.echo(json.dumps(asdict(result)))
        return
    click.echo(
        f"{result.examples:,} examples, {result.label_tokens:,} of {result.tokens:,} tokens with "
        f"weights: mean {result.mean_weight:.4f}, {result.zero_share:.1%} zero\n{result.output}"
    )
