"""Memory that really does not suffice: the system refuses it to a process of its own."""

import itertools
import re
import subprocess
import sys

import numpy as np
import torch
import transformers as tf

from tests import cli_fixtures as cli
from tests.scoring import all_positions, assert_equal_stats, scorer_of, sequences

MIB = 1 << 20


def model_of() -> tf.LlamaForCausalLM:
    """Its attention is eager: it holds float32 [B, 8, T, T] several times."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        attn_implementation="eager",
    )
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def cases(which: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sequences, and the positions to score."""
    if which == "many":
        ids = sequences(301, [300, 280, 290, 40, 7] * 8)
        return ids, all_positions(ids)
    if which == "one":
        ids = sequences(301, [100, 90, 3000, 110])
        return ids, all_positions(ids)
    prompt, *answers = sequences(301, [300] + [100, 90] * 20)
    ids = [np.concatenate([prompt, answer]) for answer in answers]
    return ids, [np.arange(len(prompt), len(s)) for s in ids]


def limited(which: str, room: int, result: str) -> None:
    """What the process does: scores under a limit of `room` bytes beyond what it has by then."""
    import resource

    torch.set_num_threads(1)
    from prift.backends import TooLarge

    scorer = scorer_of(model_of(), batch_tokens=1 << 20)
    ids, positions = cases(which)
    few = [s[-20:] for s in ids[:2]]
    list(scorer.score(few, all_positions(few)))  # what is set up once is set up now
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room,) * 2)
    try:
        found = dict(scorer.score(ids, positions))
    except TooLarge as error:
        print(f"too large: {error.index}")
    else:
        torch.save(found, result)


def run(which: str, room: int, folder) -> tuple[str, dict | None]:
    result = folder / "found.pt"
    code = (
        f"from tests import test_out_of_memory as t; t.limited({which!r}, {room}, {str(result)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(result, weights_only=False) if result.exists() else None
    return done.stdout, found


def one_by_one(which: str) -> dict:
    """Statistics of each sequence alone, with all the memory there is."""
    ids, positions = cases(which)
    scorer = scorer_of(model_of(), batch_tokens=1, say=lambda line: None)
    return {i: dict(scorer.score([ids[i]], [positions[i]]))[0] for i in range(len(ids))}


def test_batches_are_halved_until_they_fit(tmp_path):
    said, found = run("many", 80 * MIB, tmp_path)
    budgets = [
        int(line.split()[-2].replace(",", ""))
        for line in said.splitlines()
        if line.startswith("out of memory: going on with batches of ")
    ]
    # All forty at once would hold 110 MiB in each of several copies.
    assert len(budgets) >= 2, said
    assert all(b <= a / 2 for a, b in itertools.pairwise(budgets)), budgets
    assert_equal_stats(found, one_by_one("many"))


def test_a_group_that_does_not_fit_is_scored_in_parts(tmp_path):
    said, found = run("group", 80 * MIB, tmp_path)
    assert "out of memory" in said and "not shared" not in said, said
    assert_equal_stats(found, one_by_one("group"))


def test_one_sequence_that_does_not_fit_is_named(tmp_path):
    said, found = run("one", 200 * MIB, tmp_path)
    assert "too large: 2" in said and found is None, said


def train_within(room: int, small: list[str], large: list[str]) -> None:
    """What the process does: trains with `small`, which sets up once what is set up once, then
    with `large` under a limit of `room` bytes beyond what it has by then."""
    import resource

    from prift_cli import main

    torch.set_num_threads(1)
    main(small, standalone_mode=False)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room,) * 2)
    main(large)


def test_training_says_what_to_lower(model, tmp_path):
    """2,048 sequences of 60 tokens hold 60 MiB of eager attention several times."""
    row = {"prompt": "how many clips " * 14, "completion": " go fast"}
    data = cli.write_rows(tmp_path / "rows.jsonl", [row] * 4096)
    first = ["train", "--model", model, "--data", data, "--method", "sft", "--attention", "eager"]
    flags = ["--save_steps", "1", "--max_steps", "2", "--per_device_train_batch_size"]
    small = [*first, "--output", str(tmp_path / "small"), "--", *flags, "2"]
    out = tmp_path / "large"
    large = [*first, "--output", str(out), "--", *flags, "2048", "--gradient_accumulation_steps"]
    code = f"from tests import test_out_of_memory as t; t.train_within({150 * MIB}, {small}, "
    done = subprocess.run(
        [sys.executable, "-c", code + f"{[*large, '3']})"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    [message] = re.findall("^Error: (.*)", done.stderr, re.MULTILINE)
    assert "out of memory with micro-batches of 2048 examples" in message
    assert "--per_device_train_batch_size 1024 --gradient_accumulation_steps 6`" in message
    for word in ("--max-length", "--gradient_checkpointing", "--lora-r", str(out), "--resume"):
        assert word in message
