"""Real text, real tokenizers, a real small model, where they are at hand."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from prift.cache import PriorCache, list_priors
from prift.precompute import precompute
from prift.request import request
from prift.stats import CORE
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from tests import references


def quiet(line: str) -> None:
    pass


def test_real_stories_equal_the_naive_definition(real_inputs, stories, tmp_path):
    """stories260k over TinyStories: every statistic of every label token of 30 stories."""
    data = real_inputs / "datasets" / "tinystories_prompt_response.jsonl"
    spec = DataSpec(data=(str(data),), text=TextOptions(limit=30, max_length=512))
    precompute(str(stories), spec, str(tmp_path), say=quiet)
    (identity,) = list_priors(tmp_path).values()
    config = tf.AutoConfig.from_pretrained(stories)
    examples, _ = spec.load(stories, config)
    wanted = request(examples)
    found = PriorCache(tmp_path, identity).read(wanted.keys, wanted.spans, CORE)
    model = tf.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64)
    n = 0
    nll = -found["logprob"].mean()
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor(example.input_ids[None].astype(np.int64))).logits[0].numpy()
        for t in np.flatnonzero(example.label_mask):
            z, y = logits[t - 1], int(example.input_ids[t])
            truth = references.token_stats(z, y)
            assert abs(found["logprob"][n] - truth["logprob"]) < 2e-4
            assert abs(found["entropy"][n] - truth["entropy"]) < 2e-4
            if (np.abs(z - z[y]) < 1e-3).sum() == 1:
                assert found["rank"][n] == truth["rank"] and found["n_tie"][n] == 1
                assert abs(found["log_mass_rank"][n] - truth["log_mass_rank"]) < 2e-4
            n += 1
    assert n == examples.num_labels > 1000
    assert 0.5 < nll < 2.5  # a pretrained model on text of its kind, so nothing is shifted


def qwen_shaped(real_inputs: Path, folder: Path) -> str:
    """A random Qwen2 of hidden size 64 and two layers with the real Qwen tokenizer."""
    torch.manual_seed(0)
    config = tf.Qwen2Config(
        vocab_size=151_936, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    tf.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = real_inputs / "tokenizers" / "qwen2.5-instruct"
    tf.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def prift(*words: str, timeout: float = 3000) -> tuple[str, list[float]]:
    """(stdout and stderr, resident memory in MiB every quarter second) of a prift command."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prift", *words], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,     )  # fmt: skip
    resident: list[float] = []

    def watch() -> None:
        while process.poll() is None:
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                return
            resident.append(pages * os.sysconf("SC_PAGESIZE") / 2**20)
            time.sleep(0.25)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate(timeout=timeout)[0]
    watcher.join()
    assert process.returncode == 0, output
    return output, resident


def main_job(model: str, data: Path, work: Path, *options: str) -> tuple[str, list[float]]:
    """precompute, and a short prift-mass run from its cache."""
    shared = ["--model", model, "--data", str(data), "--cache", str(work / "cache"), *options]
    output, resident = prift("precompute", *shared)
    # fmt: off
    prift(
        "train", *shared, "--method", "prift-mass", "--output", str(work / "out"), "--",
        "--max_steps", "3", "--per_device_train_batch_size", "4", "--logging_steps", "1",
    )
    # fmt: on
    assert (work / "out" / "model.safetensors").exists()
    return output, resident


def flat(resident: list[float]) -> bool:
    """The second half of the run needs no more than the first half did, give or take 5 %."""
    half = len(resident) // 2
    return max(resident[half:]) <= 1.05 * max(resident[:half])


@pytest.mark.slow
def test_a_slice_of_gsm8k_through_a_vocabulary_of_151936(real_inputs, tmp_path):
    data = real_inputs / "datasets" / "gsm8k_train.jsonl"
    model = qwen_shaped(real_inputs, tmp_path / "model")
    output, _ = main_job(model, data, tmp_path, "--limit", "60")
    assert "60 sequences scored" in output


@pytest.mark.slow
def test_all_of_gsm8k_through_a_vocabulary_of_151936(real_inputs, tmp_path):
    data = real_inputs / "datasets" / "gsm8k_train.jsonl"
    model = qwen_shaped(real_inputs, tmp_path / "model")
    output, resident = main_job(model, data, tmp_path)
    assert "7,473 sequences scored" in output
    assert flat(resident)


@pytest.mark.slow
def test_all_of_gsm8k_through_stories260k(real_inputs, stories, tmp_path):
    """924 are cut; one of them keeps no label, is dropped, counted and named."""
    data = real_inputs / "datasets" / "gsm8k_train.jsonl"
    output, resident = main_job(str(stories), data, tmp_path, "--max-length", "512")
    assert "7,472 sequences scored" in output
    assert "gsm8k_train.jsonl:3332" in output
    assert flat(resident)
