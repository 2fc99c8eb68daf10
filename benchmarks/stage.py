"""The whole of stage 1 on one model and one data set, and the floor under it, for score.py.

    floor         the body on prift's batches, and the bare matrix product of the label rows
    prift         the scorer: batches in, statistics out
    precompute    all of `prift precompute`: loading, hashing, tokenising, scoring, writing
    softmax-sort, online-score   the body on the same batches, and those on the label rows

The data are GSM8K with Qwen's tokenizer where PRIFT_REAL_INPUTS has them and the vocabulary fits,
else token ids drawn at random in GSM8K-like lengths.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as tf

from benchmarks.measure import growth
from benchmarks.variants import REFERENCES, bare, reference
from prift.backends import hf
from prift.backends.batches import Batches, Group
from prift.precompute import PrecomputeOptions, precompute
from prift.request import request
from prift.store.spans import positions_of
from prift.text.dataspec import DataSpec
from tests.toy_tokenizers import byte_level

SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}  # fmt: skip


def silent(line: str) -> None:
    """Says nothing."""


class Stage:
    """A model folder and a data file below `folder`, made where they are absent.

    tokens, labels  of all sequences, without padding
    """

    MAIN = ("floor", "prift", "precompute")
    VARIANTS = (*MAIN, *REFERENCES)

    def __init__(self, folder: Path, vocabulary: int, dtype: str, rows: int):
        self._given = (str(folder), vocabulary, dtype, rows)
        self._folder, model, data = folder, folder / "model", folder / "data.jsonl"
        if not model.exists():
            make(model, data, vocabulary, dtype, rows)
        self._model, self._data = str(model), str(data)
        config = tf.AutoConfig.from_pretrained(model)
        identity = hf.identify(model, config, dtype=dtype, logits_dtype="float32", attention="auto")
        self._scorer = hf.load(model, config, identity, compiled=True, say=silent)
        examples, _ = DataSpec(data=(self._data,)).load(model, config)
        self._sequences = [e.input_ids for e in examples]
        self._positions = [positions_of(s) for s in request(examples).spans]
        self.tokens, self.labels = examples.num_tokens, examples.num_labels

    def run(self, variant: str) -> None:
        """One pass over all data."""
        if variant == "prift":
            for _ in self._scorer.score(self._sequences, self._positions):
                pass
        elif variant == "precompute":
            with tempfile.TemporaryDirectory() as cache:
                options = PrecomputeOptions(compiled=True)
                precompute(self._model, DataSpec(data=(self._data,)), cache, options, silent)
        else:
            on_the_same_batches(self._scorer, self._sequences, self._positions, variant, 8)

    def warm(self) -> None:
        """Compiles, on the shortest sequence."""
        shortest = min(range(len(self._sequences)), key=lambda i: len(self._sequences[i]))
        few = [self._sequences[shortest]], [self._positions[shortest]]
        list(self._scorer.score(*few))

    def memory(self, variant: str) -> float:
        """Peak MiB above the loaded model and data, activations included."""
        folder, vocabulary, dtype, rows = self._given
        setup = (
            "from pathlib import Path; from benchmarks.stage import Stage\n"
            f"stage = Stage(Path({folder!r}), {vocabulary}, {dtype!r}, {rows})\n"
        )
        return growth(setup + "stage.warm()\n", f"stage.run({variant!r})")


@torch.inference_mode()
def on_the_same_batches(
    scorer: hf.HFScorer,
    sequences: list[np.ndarray],
    positions: list[np.ndarray],
    variant: str,
    block: int,
) -> None:
    """The scorer's body on the batches it would cut, then the floor or a reference.

    block  rows that a reference handles at once
    """
    head = scorer._head
    groups = [Group([i], [len(s)]) for i, s in enumerate(sequences)]
    device = head.weight.device
    batches = Batches(groups, hf.START_TOKENS[device.type])
    while batches:
        batch = batches.take()
        members = [group.members[0] for group in batch]
        ids, where = ([x[i] for i in members] for x in (sequences, positions))
        hidden = scorer._ways.rows(batch, ids, where)
        if variant == "floor":
            for rows in hidden.split(512 if device.type == "cpu" else 2048):
                bare(rows, head.weight, 4096 if device.type == "cpu" else len(head.weight))
        else:
            y = np.concatenate([s[p] for s, p in zip(ids, where, strict=True)])
            targets = torch.tensor(y, device=device).long()
            reference(variant, hidden, head.weight, targets, block)


def make(model: Path, data: Path, vocabulary: int, dtype: str, rows: int) -> None:
    torch.manual_seed(0)
    config = tf.Qwen2Config(vocab_size=vocabulary, **SHAPE)
    tf.Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(model)
    real = Path(os.environ.get("PRIFT_REAL_INPUTS", "/nonexistent"))
    text = real / "datasets" / "gsm8k_train.jsonl"
    if text.exists() and vocabulary >= 151_936:
        tokenizer = tf.AutoTokenizer.from_pretrained(real / "tokenizers" / "qwen2.5-instruct")
        data.write_text("".join(text.read_text().splitlines(True)[:rows]))
    else:
        tokenizer = byte_level()
        data.write_text("".join(json.dumps(row) + "\n" for row in drawn(vocabulary, rows)))
    tokenizer.save_pretrained(model)


def drawn(vocabulary: int, rows: int) -> list[dict]:
    """Random ids; prompts and answers as long as GSM8K's, log-normal about 54 and 118 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal([3.9, 4.7], [0.4, 0.45], (rows, 2))).astype(int) + 2
    drawn = []
    for prompt, answer in lengths.tolist():
        ids = generator.integers(0, vocabulary, prompt + answer).tolist()
        drawn.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return drawn
