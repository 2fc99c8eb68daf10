"""`prift cache export`."""

import json
from typing import Any

import click

from .command import Command, common, quiet, say
from .options import data_spec, json_option
from .weighting import prior_weigher, prior_weights


@click.command(cls=Command)
@prior_weights
@click.option(
    "--column",
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
@json_option
@common
@click.pass_context
def export(ctx: click.Context, json_output: bool, column: tuple[str, ...], **options: Any) -> None:
    """Write a data set's tokens with a rule's weights, for other trainers to read.

    Columns: input_ids, labels (-100 where not trained), weights. Takes the data options of prift
    train, reads the cache alone, and loads no model.

    \b
    Example:
      prift cache export --model Qwen/Qwen2.5-1.5B --data train.jsonl --cache prior-cache \\
        --method prift-mass --output weighted.parquet
    """
    from dataclasses import asdict

    from prift.export import ExportOptions
    from prift.export import export as run

    chosen = prior_weigher(ctx, options)
    quiet()
    spec = data_spec(options)
    del options["config"], options["debug"]
    result = run(ExportOptions(spec=spec, weigher=chosen, statistics=column, **options), say)
    if json_output:
        click.echo(json.dumps(asdict(result)))
        return
    click.echo(
        f"{result.examples:,} examples, {result.label_tokens:,} of {result.tokens:,} tokens with "
        f"weights: mean {result.mean_weight:.4f}, {result.zero_share:.1%} zero\n{result.output}"
    )
