"""`prift precompute`."""

from typing import Any

import click

from .command import Command, common, quiet, say
from .options import attention, data_options, data_spec, dtype_choice, json_option
from .vllm import engine_arguments, leave, vllm_options


@click.command(cls=Command)
@click.option("--model", required=True, metavar="M", help="The prior: model folder or hub name.")
@data_options
@click.option(
    "--cache",
    default="~/.cache/prift",
    show_default=True,
    metavar="DIR",
    help="Folder of the cache; made where it is absent.",
)
@click.option(
    "--positions",
    type=click.Choice(["labels", "all"]),
    default="labels",
    show_default=True,
    help="Score label tokens only, or every token but the first.",
)
@click.option(
    "--statistics",
    type=click.Choice(["core", "extended"]),
    default="core",
    show_default=True,
    help="extended adds collision, expected_rank and entropy_top20, which sorts every row: "
    "several times slower.",
)
@click.option(
    "--dtype",
    type=dtype_choice,
    default="auto",
    show_default=True,
    help="Of the prior's weights and activations; auto is the checkpoint's.",
)
@click.option(
    "--logits-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="bfloat16 rounds the logits as the PriFT authors' code does: for comparisons only.",
)
@attention
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Padded tokens in a batch to begin with; halved where memory does not suffice.  "
    "[default: 4096 on a CPU, 65536 on a GPU]",
)
@click.option(
    "--compile/--no-compile",
    default=None,
    help="Compile the pass over the vocabulary, which takes some seconds at the start.  "
    "[default: where it pays and a compiler is there]",
)
@click.option(
    "--storage",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of log-probability, mass rank and entropy in the cache; float16 takes about half the "
    "room (docs/cache.md#schema).",
)
@click.option(
    "--part-seconds",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="S",
    help="How often scored rows become visible; a kill loses no more than this.",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Score share I of N only, counted from 0; the N shares are the whole "
    "(docs/cache.md#many-at-once).  [default: from RANK and WORLD_SIZE (torchrun) or SLURM_PROCID "
    "and SLURM_NTASKS (srun); else everything]",
)
@vllm_options
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray scores on all machines of a Ray cluster (docs/cache.md#past-one-machine).",
)
@click.option(
    "--ray-workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Workers on the Ray cluster, at most.  [default: one per GPU, or per machine where there "
    "is none]",
)
@click.option(
    "--ray-gpus",
    type=click.IntRange(min=0),
    metavar="N",
    help="GPUs of each Ray worker: more than 1 for a model that does not fit one.  [default: 1, or "
    "0 where the cluster has none]",
)
@json_option
@common
@click.pass_context
def precompute(ctx: click.Context, json_output: bool, **options: Any) -> None:
    """Run the pretrained model once over the data and store what it thought of every token.

    Scores only what the cache lacks: run it again to continue, or after adding data. Several
    processes may run it at once, and share the work.

    \b
    Example:
      prift precompute --model Qwen/Qwen2.5-1.5B --data train.jsonl --cache prior-cache
    """
    import json
    from contextlib import nullcontext
    from dataclasses import asdict

    from prift.backends import ray_data
    from prift.precompute import PrecomputeOptions
    from prift.precompute import precompute as run
    from prift.shards import choose_shard
    from prift.signals import Stopped, Stopping

    quiet()
    spec = data_spec(options)
    model, cache = options.pop("model"), options.pop("cache")
    options["compiled"] = options.pop("compile")
    options["engine_args"] = engine_arguments(options.pop("engine_arg"))
    del options["config"], options["debug"]
    alone = options["engine"] == "ray" and options["shard"] is None  # Ray shares out the work
    shard, device = (None, None) if alone else choose_shard(options["shard"])
    options["shard"], options["device"] = shard, device
    if shard is not None:
        where = f", on {device}" if device else ""
        click.echo(f"share {shard} of the sequences ({shard.source}){where}", err=True)
    try:
        with Stopping("the part in work is finished; a second signal ends at once"):
            with ray_data.session() if options["engine"] == "ray" else nullcontext():
                result = run(model, spec, cache, PrecomputeOptions(**options), say)
    except Stopped as stop:
        ctx.exit(128 + stop.signal)
    if json_output:
        click.echo(json.dumps(asdict(result)))
    else:
        rate = result.scored_tokens / max(result.seconds, 1e-9)
        share = "" if shard is None else f"share {shard}: "
        click.echo(
            f"{share}{result.scored:,} sequences scored ({result.scored_tokens:,} tokens, "
            f"{result.seconds:.1f} s, {rate:,.0f} tok/s)\ncache: {result.folder}"
        )
    leave()
