"""A tiny random model, a few rows and a cache for the tests of the command line."""

import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers as tf
from click.testing import CliRunner, Result

from prift_cli import main
from tests.toy_tokenizers import byte_level

PRIFT = Path(sys.executable).with_name("prift")
CONTEXT = 64
ROWS = [
    {"prompt": f"Question: how many clips did {name} sell? Answer:", "completion": f" {n} clips."}
    for n, name in enumerate(["Beep", "Natalia", "tool", "user", "car", "system"], start=40)
]


def write_rows(path: Path, rows: Iterable[dict] = ROWS) -> str:
    """A JSONL file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_model(folder: Path, seed: int = 0, template: str | None = None, **config) -> str:
    """A Llama of 400 words and one layer, 16 wide, with its tokenizer; the folder."""
    tokenizer = byte_level(template)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
    }
    tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prift(*args: str | Path) -> Result:
    """`prift ARGS` in this process."""
    return CliRunner().invoke(main, [str(a) for a in args])


def precompute(model: str, data: str, cache: Path | str, *more: str) -> Result:
    return prift("precompute", "--model", model, "--data", data, "--cache", cache, *more)


def train(model: str, data: str, output: Path | str, *more: str | Path) -> Result:
    """`prift train --method sft`, unless `more` names a method, rule or preset, for two steps."""
    named = {"--method", "--rule", "--preset"} & {str(m) for m in more}
    method = () if named else ("--method", "sft")
    first, flags = list(more), []
    if "--" in first:
        first, flags = first[: first.index("--")], first[first.index("--") + 1 :]
    steps = [] if {"--max_steps", "--num_train_epochs"} & set(flags) else ["--max_steps", "2"]
    args = ["--model", model, "--data", data, "--output", output, *method, *first]
    return prift("train", *args, "--", *steps, *flags)


def shell(
    command: str | list, timeout: float = 120, room: int | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """A command line that begins with `prift`, in a process of its own. With `room` no file can
    grow over so many bytes, which is how a full disk looks from inside."""
    words = shlex.split(command) if isinstance(command, str) else [str(w) for w in command]
    assert words[0] == "prift"
    return subprocess.run(
        [PRIFT, *words[1:]],
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=None if room is None else lambda: _bound_files(room),
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def _bound_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def refused(result: Result, *words: str, code: int = 1) -> str:
    """Asserts that the command failed with this code and a message, not a traceback, that has
    all these words; returns the message."""
    said = result.output
    assert result.exit_code == code, f"exit code {result.exit_code}: {said}\n{result.exception!r}"
    assert isinstance(result.exception, SystemExit), f"escaped: {result.exception!r}"
    assert "Traceback" not in said
    assert "Error: " in said
    for word in words:
        assert word in said, f"{word!r} is not in:\n{said}"
    return said


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output
