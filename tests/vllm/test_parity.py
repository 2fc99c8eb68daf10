"""Real engines against transformers in float32: architectures, and ways to run them.

Each configuration has an engine of its own. What they share is checked in parity.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from prift.backends import Scorer, TooLong
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from tests.vllm import models
from tests.vllm.parity import check_parity
from tests.vllm.scorers import scorer

LENGTHS = [1, 2, 3, 17, 40, 100, 256, 64]


@dataclass(frozen=True)
class Prior:
    """A model in one engine, beside transformers.

    hf_folder  the model that transformers runs
    folder     the same for vLLM
    """

    folder: str
    hf_folder: str
    sequences: list[np.ndarray]
    apart_share: float
    vllm: Scorer
    hf: Scorer


@dataclass(frozen=True)
class Configuration:
    """What is run, and how.

    make  (where to, real inputs) -> (folder for vLLM, folder for transformers, sequences)
    """

    make: Callable[[Path, Callable[[], Path]], tuple[str, str, list[np.ndarray]]]
    options: dict = field(default_factory=dict)
    apart_share: float = 0.85


def random_model(kind: str, tied: bool) -> Callable:
    def make(place: Path, real: Callable[[], Path]):
        folder = models.make(place, kind, tied)
        return folder, folder, models.sequences(folder, LENGTHS)

    return make


def stories(place: Path, real: Callable[[], Path]):
    """stories260k over TinyStories, and text of its own length."""
    inputs = real()
    original = inputs / "models" / "stories260k"
    folder = models.widened(original, place)
    data = inputs / "datasets" / "tinystories_prompt_response.jsonl"
    spec = DataSpec(data=(str(data),), text=TextOptions(limit=20, max_length=512))
    examples, _ = spec.load(original, tf.AutoConfig.from_pretrained(original))
    return folder, str(original), [e.input_ids for e in examples] + drawn_lengths(512, [1, 2, 512])


def qwen_text(place: Path, real: Callable[[], Path]):
    """A vocabulary of 151,936 with Qwen's own tokenizer: GSM8K, and text sampled from the model."""
    inputs = real()
    tokenizer = tf.AutoTokenizer.from_pretrained(inputs / "tokenizers" / "qwen2.5-instruct")
    folder = models.make(place, "qwen2", True, tokenizer, vocab_size=151_936)
    data = inputs / "datasets" / "gsm8k_train.jsonl"
    spec = DataSpec(data=(str(data),), text=TextOptions(limit=3, max_length=100))
    examples, _ = spec.load(place, tf.AutoConfig.from_pretrained(folder))
    sampled = models.sequences(folder, [1, 50, 2, 100, 3, 256])
    return folder, folder, [e.input_ids for e in examples] + sampled


def drawn_lengths(vocabulary: int, lengths: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, vocabulary, n).astype(np.int32) for n in lengths]


CONFIGURATIONS = {
    # Chunked prefill: prompts of up to 512 tokens in steps of 64, several at once.
    "stories260k, chunked": Configuration(stories, {"max_num_batched_tokens": 64}),
    "llama, two ranks": Configuration(random_model("llama", False), {"tensor_parallel_size": 2}),
    "qwen2, prefix caching": Configuration(
        random_model("qwen2", False), {"engine_args": {"enable_prefix_caching": True}}
    ),
    # Many logits lie within 1e-3 of one another there.
    "qwen2, tied, V = 151,936": Configuration(qwen_text, {"max_num_batched_tokens": 256}, 0.1),
    "qwen3, tied": Configuration(random_model("qwen3", True)),
    "qwen3": Configuration(random_model("qwen3", False), {"max_num_batched_tokens": 100}),
}


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def prior(request, tmp_path_factory):
    chosen = CONFIGURATIONS[request.param]
    ranks = chosen.options.get("tensor_parallel_size", 1)
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    folder, original, sequences = chosen.make(
        tmp_path_factory.mktemp("model"), lambda: request.getfixturevalue("real_inputs")
    )
    with scorer(original) as hf, scorer(folder, backend="vllm", **chosen.options) as vllm:
        assert vllm.exact
        yield Prior(folder, original, sequences, chosen.apart_share, vllm, hf)


def test_statistics_are_those_of_transformers(prior):
    """Twice, of which the second finds whatever the engine keeps of the first."""
    assert {1, 2} <= {len(ids) for ids in prior.sequences}
    for _ in range(2):
        check_parity(prior.vllm, prior.hf, prior.hf_folder, prior.sequences, prior.apart_share)


def test_the_longest_is_the_models_context(prior):
    context = tf.AutoConfig.from_pretrained(prior.folder).max_position_embeddings
    assert max(len(ids) for ids in prior.sequences) == context
    with pytest.raises(TooLong) as told:
        list(prior.vllm.score([np.ones(context + 1, np.int32)], [np.arange(1, context + 1)]))
    assert told.value.most == context
