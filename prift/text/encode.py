"""Texts -> token ids, and which of them are labels.

The boundary between what is given and what is trained is a place in the text. It is found in the
ids through the characters that each token covers, never by tokenising what stands before it and
cutting there: with many tokenizers those ids are not a prefix of the whole's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prift.text.formats import Plain, Tokens
from prift.text.tokenizers import Codec


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence. Position 0 has no statistics, so label_mask[0] is always False.

    input_ids   int32 [T]
    label_mask  bool [T]
    straddled   tokens that cover a boundary's both sides, and are no labels for that reason
    """

    input_ids: np.ndarray
    label_mask: np.ndarray
    straddled: int = 0


@dataclass(frozen=True, slots=True)
class Rendering:
    """A templated text, the characters [begin, end) that are trained, and whether EOS is missing.

    `add_eos`: the template wrote nothing behind the last trained turn, so the encoder ends it.
    """

    text: str
    trained: list[tuple[int, int]]
    add_eos: bool = False


def encode_plain(items: Sequence[Plain], codec: Codec) -> list[Encoded]:
    """BOS where the tokenizer adds it, prompt, response, EOS; response and EOS are the labels.

    The prompt's ids are those that generation will see, and the response's follow, wherever the
    two together decode to the exact text, or at least to what the whole's own ids decode to. An
    empty response has no label, not even its EOS.
    """
    prompts = codec.ids([item.prompt for item in items])
    responses = codec.ids([item.response for item in items])
    joined = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    whole = [item.prompt + item.response for item in items]
    decoded = codec.texts(joined)
    doubtful = [i for i, text in enumerate(whole) if decoded[i] != text]
    fallback = _whole_unless_equal(
        [whole[i] for i in doubtful], [decoded[i] for i in doubtful], codec
    )
    spans = dict(zip(doubtful, fallback, strict=True))
    encoded = []
    for i, item in enumerate(items):
        if spans.get(i) is not None:
            ids, characters = spans[i]
            mask, straddled = label_spans(characters, [(len(item.prompt), len(whole[i]))])
        else:
            ids, straddled = joined[i], 0
            mask = np.arange(len(ids)) >= len(prompts[i])
        encoded.append(_finish(ids, mask, straddled, codec, bos=True, eos=bool(item.response)))
    return encoded


def _whole_unless_equal(texts: list[str], decoded: list[str], codec: Codec) -> list:
    """The whole's ids and spans for each text; None where its own ids decode to `decoded` too."""
    whole_ids = codec.ids(texts)
    exact = codec.texts(whole_ids)
    unequal = [i for i, text in enumerate(exact) if text != decoded[i]]
    spans = codec.spans([texts[i] for i in unequal]) if unequal else []
    result: list = [None] * len(texts)
    for i, span in zip(unequal, spans, strict=True):
        result[i] = span
    return result


def encode_renderings(renderings: Sequence[Rendering], codec: Codec) -> list[Encoded]:
    """Templated texts: nothing is added to what the template wrote, save a missing EOS."""
    encoded = []
    spans = codec.spans([rendering.text for rendering in renderings])
    for rendering, (ids, characters) in zip(renderings, spans, strict=True):
        mask, straddled = label_spans(characters, rendering.trained)
        encoded.append(_finish(ids, mask, straddled, codec, bos=False, eos=rendering.add_eos))
    return encoded


def encode_tokens(item: Tokens) -> Encoded:
    """Ids made elsewhere, as they are."""
    return _encoded(item.input_ids, np.array(item.labels) != -100, 0)


def label_spans(
    characters: np.ndarray, trained: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, int]:
    """Which tokens lie wholly inside a trained span, and how many cross the edge of one.

    characters  int64 [T, 2]: the half-open span of text that each token covers
    -> bool [T], count
    """
    starts, ends = characters[:, 0], characters[:, 1]
    mask = np.zeros(len(characters), bool)
    crossing = np.zeros(len(characters), bool)
    for begin, end in trained:
        mask |= (starts >= begin) & (ends <= end) & (starts < end)
        crossing |= (starts < begin) & (ends > begin) | (starts < end) & (ends > end)
    return mask, int(crossing.sum())


def _finish(
    ids: list[int], mask: np.ndarray, straddled: int, codec: Codec, bos: bool, eos: bool
) -> Encoded:
    """Adds BOS in front and EOS as a label behind, each unless the text itself spelt it there."""
    prefix = codec.prefix if bos and ids[: len(codec.prefix)] != codec.prefix else []
    suffix = [codec.eos] if eos and codec.eos is not None and ids[-1:] != [codec.eos] else []
    mask = np.concatenate([np.zeros(len(prefix), bool), mask, np.ones(len(suffix), bool)])
    return _encoded(prefix + ids + suffix, mask, straddled)


def _encoded(ids: list[int], mask: np.ndarray, straddled: int) -> Encoded:
    mask[:1] = False
    return Encoded(np.array(ids, np.int32), mask, straddled)
