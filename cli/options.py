"""Options that commands share: the data, how its text becomes tokens, the cache, the output."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prift.text.dataspec import DataSpec

TEXT_OPTIONS = ("split", "format", "labels", "template", "system", "max_length", "on_empty")
TEXT_OPTIONS += ("limit",)
"""Those of TextOptions that are on the command line."""

_OPTIONS = [
    click.option(
        "--data-weight",
        multiple=True,
        type=click.FloatRange(min=0, min_open=True),
        metavar="W",
        help="How often each --data counts per epoch, one per --data, in order: 2 is twice, 0.5 "
        "a fixed random half.  [default: 1]",
    ),
    click.option("--split", help="Split of a hub dataset, or of a folder (files named S.*, S-*)."),
    click.option(
        "--format",
        default="auto",
        show_default=True,
        help="Format of the rows (docs/formats.md); auto takes the one whose columns fit.",
    ),
    click.option(
        "--labels",
        type=click.Choice(["responses", "all"]),
        default="responses",
        show_default=True,
        help="Which tokens are trained and scored: the responses' (the assistant's), or all, the "
        "prompts' too.",
    ),
    click.option(
        "--template",
        type=click.Choice(["chat", "plain"]),
        help="Render through the chat template, or join prompt and response as they are.  "
        "[default: chat for messages and ShareGPT, else plain]",
    ),
    click.option(
        "--chat-template",
        type=click.Path(exists=True, dir_okay=False),
        metavar="FILE",
        help="Jinja chat template to use instead of the tokenizer's own.",
    ),
    click.option("--tokenizer", metavar="T", help="Tokenizer folder or name.  [default: --model]"),
    click.option("--system", metavar="TEXT", help="System message for chats that have none."),
    click.option(
        "--max-length",
        type=click.IntRange(min=2),
        metavar="N",
        help="Cut sequences to N tokens at the right; without it one over the model's context "
        "is an error.",
    ),
    click.option(
        "--on-empty",
        type=click.Choice(["drop", "error"]),
        default="drop",
        show_default=True,
        help="What to do with an example that --max-length leaves without a label token.",
    ),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="Take the first N rows of each --data only.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code that a model or tokenizer folder brings along.",
    ),
]

json_option = click.option("--json", "json_output", is_flag=True, help="Print the result as JSON.")

cache_root = click.option(
    "--cache",
    default="~/.cache/prift",
    show_default=True,
    metavar="DIR|URL",
    help="The cache: a folder, or a URL s3://, gs://, hf:// or file://.",
)

dtype_choice = click.Choice(["auto", "float32", "bfloat16", "float16"])

attention = click.option(
    "--attention",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Attention implementation of transformers; auto is sdpa, or eager for architectures "
    "whose soft-capping the others ignore.",
)


def data_options(function: Callable, required: bool = True) -> Callable:
    """Adds the shared data options to a command."""
    data = click.option(
        "--data",
        multiple=True,
        required=required,
        metavar="PATH|HUB",
        help="JSON, JSONL or Parquet file, a folder of them, or a hub dataset. Repeatable.",
    )
    for option in reversed([data, *_OPTIONS]):
        function = option(function)
    return function


def data_spec(options: dict[str, Any]) -> "DataSpec":
    """The DataSpec that these options describe; takes them out of `options`."""
    from prift.text.dataspec import DataSpec
    from prift.text.examples import TextOptions

    text = {name: options.pop(name) for name in TEXT_OPTIONS}
    return DataSpec(
        data=options.pop("data"),
        weights=options.pop("data_weight"),
        tokenizer=options.pop("tokenizer"),
        chat_template=options.pop("chat_template"),
        text=TextOptions(**text),
        trust_remote_code=options["trust_remote_code"],
    )
