"""Texts -> token ids, and which of them are labels.

The boundary between what is given and what is trained is a place in the text. It is found in the
ids through the characters that each token covers, never by tokenising what stands before it and
cutting there: with many tokenizers those ids are not a prefix of the whole's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from prift.roles import ASSISTANT, PROMPT, RESPONSE
from prift.text.formats import Plain, Tokens
from prift.text.tokenizers import Codec


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence. Position 0 has no statistics, so label_mask[0] is always False.

    input_ids   int32 [T]
    label_mask  bool [T]
    roles       uint8 [T], codes of prift.roles: of a token that covers several, the first's
    straddled   tokens that cover a boundary's both sides, and are no labels for that reason
    """

    input_ids: np.ndarray
    label_mask: np.ndarray
    roles: np.ndarray
    straddled: int = 0

    def cut(self, length: int) -> "Encoded":
        """Its first tokens."""
        parts = (self.input_ids, self.label_mask, self.roles)
        return Encoded(*(part[:length] for part in parts), self.straddled)


@dataclass(frozen=True, slots=True)
class Rendering:
    """A templated text, the characters [begin, end) that are trained, whose words it is, and
    whether EOS is missing.

    roles    (where it begins, code of prift.roles), ascending; in front of the first, PROMPT
    add_eos  the template wrote nothing behind the last trained turn, so the encoder ends it
    """

    text: str
    trained: list[tuple[int, int]]
    roles: list[tuple[int, int]] = field(default_factory=list)
    add_eos: bool = False


def encode_plain(items: Sequence[Plain], codec: Codec, everything: bool = False) -> list[Encoded]:
    """BOS where the tokenizer adds it, prompt, response, EOS; response and EOS are the labels, or
    everything.

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
            roles = _roles_at(characters, [(len(item.prompt), RESPONSE)])
        else:
            ids, straddled = joined[i], 0
            mask = np.arange(len(ids)) >= len(prompts[i])
            roles = np.where(mask, RESPONSE, PROMPT)
        if everything:
            mask, straddled = np.ones(len(ids), bool), 0
        if ids[: len(codec.prefix)] != codec.prefix:
            given = len(codec.prefix)
            mask, roles = np.r_[[everything] * given, mask], np.r_[[PROMPT] * given, roles]
            ids = codec.prefix + ids
        eos = bool(item.response)
        encoded.append(_finish(ids, mask, roles, straddled, codec, RESPONSE if eos else None))
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
        roles = _roles_at(characters, rendering.roles)
        eos = ASSISTANT if rendering.add_eos else None
        encoded.append(_finish(ids, mask, roles, straddled, codec, eos))
    return encoded


def encode_tokens(item: Tokens, everything: bool = False) -> Encoded:
    """Ids made elsewhere, as they are: their labels are the response, the rest is the prompt."""
    response = np.array(item.labels) != -100
    mask = np.ones(len(response), bool) if everything else response.copy()
    return _encoded(item.input_ids, mask, np.where(response, RESPONSE, PROMPT), 0)


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


def _roles_at(characters: np.ndarray, roles: Sequence[tuple[int, int]]) -> np.ndarray:
    """int [T]: whose words each token begins in. See Rendering."""
    begins, codes = np.array([(0, PROMPT), *roles]).T
    return codes[np.searchsorted(begins, characters[:, 0], "right") - 1]


def _finish(
    ids: list[int],
    mask: np.ndarray,
    roles: np.ndarray,
    straddled: int,
    codec: Codec,
    eos: int | None,
) -> Encoded:
    """Adds EOS behind as a label of the role `eos`, unless that is None or the text spelt it."""
    if eos is not None and codec.eos is not None and ids[-1:] != [codec.eos]:
        ids, mask, roles = [*ids, codec.eos], np.append(mask, True), np.append(roles, eos)
    return _encoded(ids, mask, roles, straddled)


def _encoded(ids: list[int], mask: np.ndarray, roles: np.ndarray, straddled: int) -> Encoded:
    mask[:1] = False
    return Encoded(np.array(ids, np.int32), mask, roles.astype(np.uint8), straddled)
