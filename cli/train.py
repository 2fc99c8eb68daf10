"""`prift train`."""

from typing import Any

import click

from prift.errors import Interrupted, OptionError

from .command import TRAINING, Command, common, quiet, resolved, say
from .options import attention, data_options, data_spec, dtype_choice, json_option
from .weighting import chosen_weigher, weighting_options


class TrainCommand(Command):
    """Its config file may also hold TrainingArguments."""

    config_keys = (TRAINING,)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            error.message += " Flags of transformers.TrainingArguments go behind a lone --."
            raise


@click.command(cls=TrainCommand)
@click.option("--model", required=True, metavar="M", help="Model to train: folder or hub name.")
@data_options
@click.option("--eval-data", multiple=True, metavar="PATH|HUB", help="Held-out data. Repeatable.")
@click.option("--eval-split", metavar="S", help="Split of --eval-data, as --split is of --data.")
@click.option(
    "--cache",
    default="~/.cache/prift",
    show_default=True,
    metavar="DIR",
    help="The cache that prift precompute wrote.",
)
@click.option("--output", required=True, metavar="DIR", help="Where the trained model goes.")
@weighting_options
@click.option(
    "--prior",
    multiple=True,
    metavar="MODEL|ID",
    help="Which prior of the cache to read; twice, for a rule that compares two.  [default: the "
    "only one of --model]",
)
@click.option(
    "--normalize",
    type=click.Choice(["tokens", "kept", "weights", "sequence", "micro-batch", "micro-batch-sum"]),
    default="tokens",
    show_default=True,
    help="What a step's loss is divided by: its label tokens, those of nonzero weight, the sum of "
    "weights; or the mean over its sequences, or of its micro-batches' means, or their sum.",
)
@click.option(
    "--anchor",
    type=click.Choice(["k3"]),
    help="Hold the model to the prior: add an estimate of how far it moved on label tokens.",
)
@click.option(
    "--anchor-weight", type=float, metavar="L", help="Factor of the anchor, which --anchor needs."
)
@click.option(
    "--dtype",
    type=dtype_choice,
    default="float32",
    show_default=True,
    help="Of the master weights; for mixed precision keep float32 and add -- --bf16.",
)
@attention
@click.option("--lora-r", type=click.IntRange(min=1), metavar="N", help="Train a LoRA of rank N.")
@click.option("--lora-alpha", type=float, metavar="A", help="LoRA scale.  [default: 2 N]")
@click.option(
    "--lora-dropout",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="P",
    help="Dropout in front of the LoRA.",
)
@click.option(
    "--lora-target",
    default="all-linear",
    show_default=True,
    metavar="NAMES",
    help="Modules to adapt, comma-separated.",
)
@click.option("--merge", is_flag=True, help="Write a whole model with the adapter merged in.")
@click.option(
    "--packing",
    is_flag=True,
    help="Lay a batch's examples end to end, without padding; they never see each other.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output.")
@click.option(
    "--skip-check",
    is_flag=True,
    help="Train even if the model disagrees with the cache about its own statistics.",
)
@click.option(
    "--full-metrics-steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure nll and drift over all label tokens every N steps.  [default: logging_steps]",
)
@json_option
@common
@click.argument("training_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- FLAGS...]")
@click.pass_context
def train(
    ctx: click.Context,
    json_output: bool,
    prior: tuple[str, ...],
    training_flags: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune a model with token weights; no reference model is loaded.

    Everything after -- is a flag of transformers.TrainingArguments. A weighted loss reads 10 to
    20 times smaller than plain SFT's: compare runs by nll and drift.

    \b
    Example:
      prift train --model Qwen/Qwen2.5-1.5B --data train.jsonl --cache prior-cache \\
        --method prift-mass --output out -- --bf16 --learning_rate 5e-5 --num_train_epochs 1
    """
    if len(prior) > 2:
        raise OptionError("--prior may be given twice, not more often.")
    if options["merge"] and not options["lora_r"]:
        raise OptionError("--merge merges an adapter: it needs --lora-r.")

    import sys
    from contextlib import redirect_stdout

    from prift.arguments import training_arguments
    from prift.ranks import is_rank_zero, leave
    from prift.train import train as run
    from prift.training_data import TrainOptions

    chosen = chosen_weigher(ctx, options)
    first, second = (*prior, None, None)[:2]
    quiet()
    kept = resolved(ctx)
    spec = data_spec(options)
    del options["config"], options["debug"]
    settings, given = training_arguments(
        options["output"],
        {} if ctx.obj is None else ctx.obj,
        training_flags,
        bool(options["eval_data"]),
    )
    result, stopped = None, None
    with redirect_stdout(sys.stderr):  # Trainer prints its logs; stdout is for the result
        try:
            result = run(
                TrainOptions(spec=spec, weigher=chosen, prior=first, base_prior=second, **options),
                settings,
                kept | {TRAINING: given},
                say,
            )
        except Interrupted as stop:
            stopped = stop.with_traceback(None)  # which would keep the trainer alive
    leave()
    if stopped is not None:
        raise stopped
    if is_rank_zero():
        _show(result, json_output)


def _show(result: Any, json_output: bool) -> None:
    import json
    from dataclasses import asdict

    if json_output:
        click.echo(json.dumps(asdict(result)))
        return
    shown = {
        k: v
        for k, v in result.metrics.items()
        if k in ("nll", "drift", "mean_weight", "zero_share", "eval_nll")
    }
    click.echo(
        f"{result.steps:,} steps in {result.seconds:.1f} s: "
        + ", ".join(f"{k} {v:.4f}" for k, v in shown.items())
        + f"\nmodel: {result.output}"
    )
