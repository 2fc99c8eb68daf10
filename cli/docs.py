"""docs/cli.md, made from the commands' own help:

python -m prift_cli.docs > docs/cli.md
"""

from collections.abc import Iterator

import click

from . import main

WIDTH = 100

HEAD = """# The command line

Made from `--help` by `python -m prift_cli.docs > docs/cli.md`; do not edit it by hand.

Exit codes: 0 is success, 1 an error that the message says how to mend, 2 a wrong use of the command
line, 130 an interrupt (Ctrl-C). Messages and progress go to stderr, results to stdout. `--debug`
shows the traceback of an error.

`--config RUN.YAML` fills options by name (`max_length: 512`, `data: [a.jsonl, b.jsonl]`). The
command line wins over it, and unknown keys are refused. For `prift train` its key `training:` holds
[TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer), as do the flags
behind `--`. Every training run writes its options to `prift.yaml` in the output folder, itself a
valid `--config`.
"""


def commands(
    command: click.Command = main, parent: click.Context | None = None
) -> Iterator[tuple[click.Command, click.Context]]:
    """The command and all below it, each with the context that its help is printed in."""
    name = "prift" if parent is None else command.name
    ctx = command.make_context(
        name, [], parent=parent, resilient_parsing=True, terminal_width=WIDTH
    )
    yield command, ctx
    if isinstance(command, click.Group):
        for child in command.list_commands(ctx):
            yield from commands(command.commands[child], ctx)


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for command, ctx in commands():
        parts.append(f"\n## `{ctx.command_path}`\n\n```text\n{command.get_help(ctx)}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    click.echo(page(), nl=False)
