"""Loading tokenizers, and the few questions the text half of prift asks them.

`Codec` knows ids, character spans and exact decoding. It knows no dataset, no chat, no labels.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prift.errors import DataError, first_line


def load_tokenizer(
    name_or_path: str, chat_template_file: str | None = None, trust_remote_code: bool = False
):
    """The tokenizer of a model folder or hub name; the file's text replaces its chat template.

    Raises DataError when there is no such tokenizer or the template file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("it has no vocabulary")  # some are made out of a config.json alone
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"no tokenizer could be loaded from {name_or_path!r}: {first_line(error)}. "
            "Name a folder or a hub model that has one with --tokenizer."
        ) from error
    if chat_template_file is not None:
        tokenizer.chat_template = _read_template(Path(chat_template_file))
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat-template {path} cannot be read: {first_line(error)}") from error
    if not text.strip():
        raise DataError(f"--chat-template {path} is empty; it should hold a Jinja chat template")
    return text


def tokenizer_digest(tokenizer) -> str:
    """sha256 hex of what decides the ids: the vocabulary, its rules and the special tokens.

    Leaves out names, paths, and the truncation and padding that a fast tokenizer remembers from
    its last call.
    """
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model.pop("truncation", None)
        model.pop("padding", None)
    else:
        model = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return _sha256({"model": model, "special": _special(tokenizer)})


def _special(tokenizer) -> dict:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items()}


def template_digest(tokenizer) -> str | None:
    """sha256 hex of the chat template (a string, or named templates); None where there is none."""
    return None if tokenizer.chat_template is None else _sha256(tokenizer.chat_template)


def _sha256(content) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Codec:
    """A tokenizer as the encoders use it: ids, spans and text, never truncated or padded.

    prefix   ids that `tokenizer(text)` puts before a text's own (BOS, or nothing)
    eos      the end-of-sequence id, None where the tokenizer has none
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        self._fast = _bare_backend(tokenizer) if tokenizer.is_fast else None
        self.prefix: list[int] = _prefix(tokenizer)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenizer(text, add_special_tokens=False)` of each text."""
        if self._fast is None:
            return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        # Straight to the backend: same ids, without 100 microseconds of Python for each text.
        encoded = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """The same ids with the characters each covers: int64 [T, 2], half-open, in the text.

        Raises DataError where the tokenizer is written in Python and knows no spans.
        """
        if self._fast is None:
            raise DataError(
                f"{type(self.tokenizer).__name__} cannot say which characters a token covers, "
                "which this data needs. Name a tokenizer with a tokenizer.json with --tokenizer."
            )
        encoded = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return [(one.ids, np.array(one.offsets, np.int64).reshape(-1, 2)) for one in encoded]

    def texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The exact text of each sequence, special tokens spelled out, spaces as they are."""
        if self._fast is not None:
            return self._fast.decode_batch(list(sequences), skip_special_tokens=False)
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [self.tokenizer.decode(ids, **options) for ids in sequences]


def _bare_backend(tokenizer):
    """A copy of the fast tokenizer without its post-processor, truncation and padding.

    A post-processor does two things: it adds special tokens, which `Codec.prefix` knows, and in
    some tokenizers (Llama 3, RoBERTa) it trims the spaces off the spans, so that a token such as
    " Paris" would seem to lie wholly behind a boundary that runs through it.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _prefix(tokenizer) -> list[int]:
    """What special tokens a text gets in front, seen on a text that the vocabulary has."""
    for text in ("a", "0", "A", "\n"):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return list(whole[:start])
    raise DataError(
        f"{type(tokenizer).__name__} encodes {text!r} as {whole} with special tokens and as {bare} "
        "without, so what it puts before a text cannot be told. Try another --tokenizer."
    )
