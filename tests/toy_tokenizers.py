"""Small tokenizers of the kinds that matter, trained in a moment on a few sentences."""

import json
from functools import cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Once upon a time, there was a little car named Beep. Beep loved to go fast.",
    "Question: how many clips did Natalia sell? Answer: she sold 48 + 24 = 72 clips.\n#### 72",
    "Hello! How can I help you today? assistant user system tool <tool_call> helloworld",
] * 4
SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "{{ '<tool_call>' + call.function.name + call.function.arguments | tojson }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def byte_level(template: str | None = None):
    """GPT-2's kind: every byte a token at worst, no BOS, EOS <|endoftext|>."""
    backend = Tokenizer.from_str(_byte_level())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=template
    )


def trimming(template: str | None = None):
    """Llama 3's kind: byte-level with BOS, and spans that leave out the spaces."""
    backend = Tokenizer.from_str(_byte_level())
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@cache
def _sentencepiece() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    # Word by word, as SentencePiece trains: the space belongs to the word behind it.
    words = {word for sentence in SENTENCES for word in sentence.split()}
    tokenizer.train_from_iterator([word for word in sorted(words) for _ in range(4)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    bpe = models.BPE(
        vocab,
        [tuple(merge) for merge in model["merges"]],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    normalizer, tokenizer = tokenizer.normalizer, Tokenizer(bpe)
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    single = [("<s>", vocab["<s>"])]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=single)
    return tokenizer.to_str()


def sentencepiece(template: str | None = None):
    """Llama 2's kind: a space put in front of every text, byte fallback, BOS."""
    backend = Tokenizer.from_str(_sentencepiece())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )
