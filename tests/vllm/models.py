"""Models that vLLM runs on a CPU, whose attention there wants heads of 32 dimensions or more."""

from pathlib import Path

import numpy as np
import torch
import transformers as tf

from tests.toy_tokenizers import byte_level

CONTEXT = 256
HEAD = 32  # the smallest that vLLM's attention on a CPU knows
_SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
_KINDS = {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config, "qwen3": tf.Qwen3Config}


def make(folder: Path, kind: str, tied: bool, tokenizer: object = None, **sizes) -> str:
    """A random model of a kind with its tokenizer (or a small one); its folder.

    Its weights are spread so that some tokens are likely and most are not: entropy lies at about
    3 nats where the vocabulary is small.
    """
    torch.manual_seed(0)
    options = {**_SIZES, **sizes, "tie_word_embeddings": tied}
    if kind == "qwen3":
        options["head_dim"] = HEAD
    model = tf.AutoModelForCausalLM.from_config(_KINDS[kind](**options))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.25)
    model.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return str(folder)


def widened(folder: Path, into: Path) -> str:
    """The same Llama with heads of HEAD dimensions, of which the new ones hold nothing.

    Rotary embeddings turn dimensions (i, i + d/2) by an angle that depends on i/d, so that the
    dimensions go where i/d stays what it was; queries grow by the root of what attention divides
    by more.
    """
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    old = config.hidden_size // config.num_attention_heads
    step, half = HEAD // old, old // 2
    places = [i * step for i in range(half)] + [HEAD // 2 + i * step for i in range(half)]
    changed = tf.LlamaConfig(**{**config.to_dict(), "head_dim": HEAD})
    wide = tf.AutoModelForCausalLM.from_config(changed)
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            heads = weight.view(-1, old, weight.shape[1])
            spread = heads.new_zeros(len(heads), HEAD, weight.shape[1])
            spread[:, places] = heads * ((HEAD / old) ** 0.5 if "q_proj" in name else 1)
            weights[name] = spread.flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            heads = weight.view(len(weight), -1, old)
            spread = heads.new_zeros(len(weight), heads.shape[1], HEAD)
            spread[:, :, places] = heads
            weights[name] = spread.flatten(1)
    wide.load_state_dict(weights)
    wide.save_pretrained(into)
    tf.AutoTokenizer.from_pretrained(folder).save_pretrained(into)
    return str(into)


def sequences(folder: str, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Token ids of these lengths: by turns drawn at random, and sampled from the model itself,
    whose next tokens are likely ones."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    drawn = [generator.integers(1, vocabulary, n) for n in lengths]
    for i, ids in enumerate(drawn):
        if i % 2 and 1 < len(ids) < context:
            given = torch.tensor(ids[None, :1])
            sampled = model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=True, temperature=0.8,
                top_k=0, max_length=len(ids), min_length=len(ids), pad_token_id=0,
            )  # fmt: skip
            drawn[i] = sampled[0].numpy()
    assert [len(s) for s in drawn] == lengths
    return [s.astype(np.int32) for s in drawn]
