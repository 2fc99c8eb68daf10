"""What befalls an engine: signals, dead workers, no memory, models that it does not take, NaN.

Each in a run of its own; what was scored before is kept, and the error says what mends it.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import transformers as tf

from prift.backends import BadLogits
from tests.vllm import models
from tests.vllm.conftest import CORES
from tests.vllm.lab import VLLMLab, at_row
from tests.vllm.scorers import all_positions, scorer

SMALL = ("--max-num-batched-tokens", "64", "--part-seconds", "0")


def refused(done, *words: str) -> str:
    """Asserts that the command ended with an error that has all these words; what it said."""
    assert done.returncode == 1, f"{done.returncode}: {done.stderr}"
    assert "Traceback" not in done.stderr and "Error: " in done.stderr, done.stderr
    for word in words:
        assert re.search(word, done.stderr), f"{word!r} is not in:\n{done.stderr}"
    return done.stderr


def test_ctrl_c_finishes_the_part_in_work(tmp_path):
    """A terminal's Ctrl-C reaches every process of the command, vLLM's too."""
    lab = VLLMLab(tmp_path, rows=900)
    moment = "os.killpg(0, signal.SIGINT)"
    done = lab.run(*SMALL, program=at_row(120, moment))
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
    kept = int(re.search(r"stopped: (\d+) sequences scored by this run are kept", done.stderr)[1])
    assert 120 <= kept == lab.rows() < 890


def test_prift_is_killed_while_the_engine_starts(tmp_path):
    """Before it can ask the engine for anything. VLLMLab.run sees to it that no process is left."""
    lab = VLLMLab(tmp_path, rows=5)
    program = (
        "import os, signal, prift_cli\n"
        "from prift.backends.vllm_engine import Engine\n"
        "Engine.call = lambda *asked: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prift_cli.main()\n"
    )
    assert lab.run(program=program).returncode == -9
    assert lab.rows() == 0


def test_one_of_two_workers_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(CORES[:2]))
    lab = VLLMLab(tmp_path, rows=900)
    worker = (
        "[p for p in psutil.Process().children(recursive=True)"
        " if p.ppid() != os.getpid() and 'spawn_main' in str(p.cmdline())][-1].kill()"
    )
    program = at_row(120, worker)
    done = lab.run(*SMALL, "--tensor-parallel-size", "2", program=program)
    refused(done, "Error: vLLM gave up: .*(died|killed|ended)", "What was scored is kept")
    assert 120 <= lab.rows() < 890


def test_memory_ends_in_the_middle(tmp_path):
    """The engine's processes may take no more than they have: a step's logits do not fit."""
    lab = VLLMLab(tmp_path, rows=1200, vocab_size=151_936)
    limit = (
        "[p.rlimit(psutil.RLIMIT_AS, (p.memory_info().vms,) * 2)"
        " for p in psutil.Process().children(recursive=True)]"
    )
    program = at_row(50, limit)
    done = lab.run("--max-num-batched-tokens", "256", "--part-seconds", "0", program=program)
    refused(done, "Error: vLLM gave up", "Lower --max-num-batched-tokens", "What was scored")
    assert 50 <= lab.rows() < 1200


def test_heads_that_its_attention_does_not_know(tmp_path):
    lab = VLLMLab(tmp_path, rows=5, num_attention_heads=8)  # of 16 dimensions
    refused(lab.run(), "Error: vLLM .*head_dim=16", "use --backend hf")
    assert lab.rows() == 0


def test_an_architecture_that_it_does_not_know(tmp_path):
    lab = VLLMLab(tmp_path, rows=5)
    config = tf.RwkvConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, context_length=64,
        attention_hidden_size=32,
    )  # fmt: skip
    for file in Path(lab.model).glob("*.safetensors"):
        file.unlink()
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(lab.model)
    refused(lab.run(), "Error: vLLM does not start", "(?i)rwkv", "--backend hf")


def test_an_engine_argument_that_it_does_not_know(tmp_path):
    lab = VLLMLab(tmp_path, rows=5)
    refused(lab.run("--engine-arg", "no_such=1"), "no_such", "--engine-arg")


def test_room_for_no_sequence(tmp_path, monkeypatch):
    lab = VLLMLab(tmp_path, rows=5)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")  # GiB
    refused(lab.run(), "Error: vLLM does not start", "(?i)memory")


def test_logits_that_are_no_distribution(tmp_path):
    """One token's embedding is NaN: the sequence that has it is named, others are scored."""
    folder = models.make(tmp_path, "llama", tied=False)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.embed_tokens.weight"][300] = float("nan")
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    good = [np.arange(1, n).astype(np.int32) for n in (5, 60, 9)]
    bad = np.array([5, 6, 300, 7, 8], np.int32)
    found = []
    with scorer(folder, backend="vllm") as vllm, pytest.raises(BadLogits) as told:
        for i, stats in vllm.score([*good, bad], all_positions([*good, bad])):
            assert np.isfinite(stats.logprob.numpy()).all()
            found.append(i)
    # Its attention on a CPU spreads NaN to tokens that stand before, so only the sequence is sure.
    assert told.value.index == 3 and sorted(found) == [0, 1, 2]
