"""`prift precompute --backend vllm`: its options, and how its process ends."""

import atexit
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from prift.errors import OptionError

from .command import key_values

_OPTIONS = [
    click.option(
        "--backend",
        type=click.Choice(["hf", "vllm"]),
        default="hf",
        show_default=True,
        help="What runs the prior: transformers, or vLLM (docs/backends.md).",
    ),
    click.option(
        "--vllm-mode",
        type=click.Choice(["auto", "exact", "bounds"]),
        default="auto",
        show_default=True,
        help="exact: all statistics, from vLLM's workers; bounds: without entropy, and only the "
        "sequences of which its most probable tokens say enough; auto: exact where its self-test "
        "passes, else bounds.",
    ),
    click.option(
        "--tensor-parallel-size",
        type=click.IntRange(min=1),
        metavar="N",
        help="GPUs over which vLLM spreads each layer.  [default: 1]",
    ),
    click.option(
        "--gpu-memory-utilization",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="SHARE",
        help="Share of a GPU's memory that vLLM takes.  [default: 0.85; 0.4 of the "
        "machine's memory where there is no GPU]",
    ),
    click.option(
        "--max-num-batched-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens of a step of vLLM, whose logits exist at once.  [default: 2048]",
    ),
    click.option(
        "--quantization",
        metavar="NAME",
        help="Have vLLM quantise the prior as it loads it (fp8, ...): another prior. One that is "
        "stored quantised needs no option.",
    ),
    click.option(
        "--engine-arg",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any other argument of vLLM's engine, its value as JSON or text. Repeatable.",
    ),
]


def vllm_options(function: Callable) -> Callable:
    """Adds --backend and the options of vLLM to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def engine_arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """name=value strings as arguments: numbers, booleans, lists and objects as JSON has them, all
    else text. Raises OptionError."""
    return {name: _value(text) for name, text in key_values(pairs, "--engine-arg").items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        if text[:1] in "[{":
            raise OptionError(f"--engine-arg: {text} is no JSON") from None
        return text


def leave() -> None:
    """Ends the process where vLLM was used, with 0, without the destructors of the libraries it
    loads: a thread of theirs that is left then may abort the process when all is done."""
    if "vllm" in sys.modules:
        sys.stdout.flush(), sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(0)
