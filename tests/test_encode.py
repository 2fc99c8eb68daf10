"""Plain text -> ids and labels: exact text, BOS once, EOS once, boundaries by characters."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from prift.errors import DataError
from prift.roles import ASSISTANT, PROMPT, RESPONSE, USER
from prift.text.encode import Rendering, encode_plain, encode_renderings, encode_tokens, label_spans
from prift.text.formats import Plain, Tokens
from prift.text.tokenizers import Codec, load_tokenizer
from tests.toy_tokenizers import byte_level, sentencepiece, trimming

BYTES, TRIMMED, SPM = Codec(byte_level()), Codec(trimming()), Codec(sentencepiece())
TEXTS = st.text(max_size=40) | st.text("aehlo wrd\n .", max_size=40)


def one(codec, prompt, response):
    return encode_plain([Plain(prompt, response)], codec)[0]


def shown(codec, encoded):
    """(what is not trained, what is): the decoded pieces of both halves."""
    ids, mask = encoded.input_ids.tolist(), encoded.label_mask.tolist()
    pieces = codec.tokenizer.convert_ids_to_tokens(ids)
    return (
        [piece for piece, label in zip(pieces, mask, strict=True) if not label],
        [piece for piece, label in zip(pieces, mask, strict=True) if label],
    )


def test_prompt_response_and_one_eos_which_is_a_label():
    given_, trained = shown(BYTES, one(BYTES, "Once upon", " a time."))
    assert given_ == ["Once", "Ġupon"]
    assert trained == ["Ġa", "Ġtime", ".", "<|endoftext|>"]


def test_bos_once_where_the_tokenizer_adds_it():
    assert TRIMMED.prefix == SPM.prefix == [1]
    assert BYTES.prefix == []
    assert shown(TRIMMED, one(TRIMMED, "Once", " upon")) == (["<s>", "Once"], ["Ġupon", "</s>"])
    assert shown(TRIMMED, one(TRIMMED, "<s>Once", " upon</s>")) == (
        ["<s>", "Once"],
        ["Ġupon", "</s>"],
    )


def test_the_prompts_ids_are_those_that_generation_sees_even_where_the_whole_differs():
    whole = BYTES.ids(["helloworld"])[0]
    prompt, response = BYTES.ids(["hello"])[0], BYTES.ids(["world"])[0]
    assert one(BYTES, "hello", "world").input_ids.tolist() == [*prompt, *response, 0]
    boundary = Codec(byte_level()).ids(["hel"])[0]
    encoded = one(BYTES, "hel", "loworld")
    assert encoded.input_ids[: len(boundary)].tolist() == boundary != whole[: len(boundary)]


def test_sentencepiece_response_behind_a_space():
    """Encoded alone, " a" would get a second space in front, so the whole is cut instead."""
    assert shown(SPM, one(SPM, "Once upon", " a")) == (["<s>", "▁Once", "▁upon"], ["▁a", "</s>"])


def test_sentencepiece_without_a_space_is_cut_by_characters():
    """Encoded alone, "world" would begin with a space that the text does not have."""
    encoded = one(SPM, "hello\n", "world")
    assert SPM.texts([SPM.ids(["hello\n"])[0] + SPM.ids(["world"])[0]]) == ["hello\n world"]
    assert SPM.texts([encoded.input_ids[1:-1].tolist()]) == ["hello\nworld"]
    assert "".join(shown(SPM, encoded)[1]) == "world</s>"
    assert encoded.straddled == 0


def test_a_token_that_straddles_the_boundary_is_no_label_and_is_counted():
    encoded = one(SPM, "Once ", "upon a")
    assert shown(SPM, encoded) == (["<s>", "▁Once", "▁upon"], ["▁a", "</s>"])
    assert encoded.straddled == 1


def test_trimmed_spans_do_not_hide_that_a_token_straddles():
    """The tokenizer's own offsets say (5, 9) for " upon"; the space before it is prompt."""
    own = TRIMMED.tokenizer("Once upon", return_offsets_mapping=True)["offset_mapping"]
    assert own[-1] == (5, 9)
    ids, characters = TRIMMED.spans(["Once upon"])[0]
    assert characters.tolist() == [[0, 4], [4, 9]]
    text = Rendering("Once upon a", [(5, 11)])
    encoded = encode_renderings([text], TRIMMED)[0]
    assert (encoded.label_mask.tolist(), encoded.straddled) == ([False, False, True], 1)


def test_an_empty_response_has_no_label_and_an_empty_prompt_no_harm():
    assert not one(BYTES, "Once", "").label_mask.any()
    assert shown(TRIMMED, one(TRIMMED, "", "Once")) == (["<s>"], ["Once", "</s>"])
    assert shown(BYTES, one(BYTES, "", "Once upon")) == (["Once"], ["Ġupon", "<|endoftext|>"])


def test_a_tokenizer_without_eos_ends_no_text():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    codec = Codec(tokenizer)
    assert shown(codec, one(codec, "Once", " upon")) == (["Once"], ["Ġupon"])


def test_a_tokenizer_written_in_python():
    codec = Codec(ByT5Tokenizer())
    encoded = one(codec, "é", "ab")
    assert encoded.input_ids.tolist() == [198, 172, 100, 101, 1]
    assert encoded.label_mask.tolist() == [False, False, True, True, True]
    with pytest.raises(DataError, match="ByT5Tokenizer cannot say which characters a token covers"):
        codec.spans(["a"])


def test_tokens_made_elsewhere_are_kept_and_position_0_is_no_label():
    encoded = encode_tokens(Tokens([5, 6, 7], [5, -100, 7]))
    assert encoded.input_ids.tolist() == [5, 6, 7]
    assert encoded.label_mask.tolist() == [False, False, True]
    assert (encoded.input_ids.dtype, encoded.label_mask.dtype) == (np.int32, np.bool_)


def test_label_spans_of_hand_made_characters():
    characters = np.array([[0, 2], [2, 5], [5, 5], [5, 6], [6, 9], [9, 10], [10, 12], [12, 14]])
    mask, straddled = label_spans(characters, [(2, 5), (7, 11)])
    assert mask.tolist() == [False, True, False, False, False, True, False, False]
    assert straddled == 2  # [6, 9) covers the beginning 7, and [10, 12) the end 11


P, R = PROMPT, RESPONSE


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("codec", "prompt", "response", "roles", "labels"),
    [
        (BYTES, "Once upon", " a time", [P, P, R, R, R], "00111"),
        (TRIMMED, "Once", " upon", [P, P, R, R], "0011"),  # BOS in front
        (BYTES, "", " upon", [R, R], "01"),
        (BYTES, "Once upon", "", [P, P], "00"),
        # "▁upon" covers both sides: it begins in the prompt
        (SPM, "Once ", "upon a", [P, P, P, R, R], "00011"),
    ],
)
def test_whose_words_and_which_are_labels(codec, prompt, response, roles, labels, everything):
    """Everything: all but the first token of a sequence, whatever covers two sides."""
    (found,) = encode_plain([Plain(prompt, response)], codec, everything)
    assert found.roles.tolist() == roles and found.roles.dtype == np.uint8
    expected = "0" + "1" * (len(roles) - 1) if everything else labels
    assert "".join("01"[int(one)] for one in found.label_mask) == expected
    assert found.straddled == (codec is SPM and not everything)


@pytest.mark.parametrize("everything", [False, True])
def test_tokens_made_elsewhere_say_what_is_response_by_their_labels(everything):
    found = encode_tokens(Tokens([5, 6, 7, 8], [5, -100, 7, -100]), everything)
    assert found.roles.tolist() == [R, P, R, P]
    expected = [False, True, True, True] if everything else [False, False, True, False]
    assert found.label_mask.tolist() == expected


def test_roles_of_a_rendering_are_those_of_the_characters_a_token_begins_with():
    text = Rendering("Once upon a", [(0, 11)], [(0, USER), (7, ASSISTANT)], add_eos=True)
    found = encode_renderings([text], BYTES)[0]
    assert BYTES.tokenizer.convert_ids_to_tokens(found.input_ids.tolist())[1] == "Ġupon"
    assert found.roles.tolist() == [USER, USER, ASSISTANT, ASSISTANT]
    assert found.label_mask.tolist() == [False, True, True, True]


def test_a_missing_eos_is_added_to_a_rendering_as_a_label():
    text = Rendering("Once upon", [(4, 9)], [(4, ASSISTANT)], add_eos=True)
    assert shown(TRIMMED, encode_renderings([text], TRIMMED)[0]) == (["Once"], ["Ġupon", "</s>"])


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_byte_level_ids_decode_to_the_exact_text_and_labels_to_the_response(prompt, response):
    encoded = one(BYTES, prompt, response)
    mask = encoded.label_mask.copy()
    if response:
        assert encoded.input_ids[-1] == 0
        if not prompt:
            mask[0] = True  # position 0 is response here, though it can be no label
        assert BYTES.texts([encoded.input_ids[mask].tolist()]) == [response + "<|endoftext|>"]
    end = len(encoded.input_ids) - bool(response)
    assert BYTES.texts([encoded.input_ids[:end].tolist()]) == [prompt + response]
    assert encoded.straddled == 0
    assert encoded.input_ids[: len(mask) - mask.sum()].tolist() == BYTES.ids([prompt])[0]


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS.filter(bool))
def test_sentencepiece_decodes_as_the_whole_and_labels_reach_back_to_the_prompt(prompt, response):
    encoded = one(SPM, prompt, response)
    ids = encoded.input_ids.tolist()
    assert ids[0] == 1 and ids[-1] == 2
    whole = SPM.ids([prompt + response])[0]
    assert SPM.texts([ids[1:-1]]) == SPM.texts([whole])
    # The labels are one run up to the end; before it stand the prompt and what straddles its end.
    first = len(ids) - int(encoded.label_mask.sum())
    assert encoded.label_mask[first:].all()
    left, prompted = SPM.texts([ids[1:first], SPM.ids([prompt])[0]])
    assert left == prompted or (encoded.straddled and left.startswith(prompted))


@pytest.mark.parametrize(
    "folder", ["qwen2.5-instruct", "mistral-v0.1-chatml", "gpt2", "../models/stories260k"]
)
def test_real_tokenizers_are_exact_on_real_rows(real_inputs, folder):
    tokenizer = load_tokenizer(str(real_inputs / "tokenizers" / folder))
    codec = Codec(tokenizer)
    items = []
    for file, asked, answered in (
        ("tinystories_prompt_response.jsonl", "prompt", "response"),
        ("gsm8k_train.jsonl", "question", "answer"),
    ):
        with (real_inputs / "datasets" / file).open() as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
        items += [Plain(row[asked], row[answered]) for row in rows]
        items += [Plain(row[asked] + " ", row[answered].strip()) for row in rows]
        items += [Plain(row[asked] + "\n", row[answered].strip() + "\n") for row in rows]
    for item, encoded in zip(items, encode_plain(items, codec), strict=True):
        ids, mask = encoded.input_ids.tolist(), encoded.label_mask
        start = len(codec.prefix)
        assert ids[:start] == codec.prefix and ids[-1] == tokenizer.eos_token_id
        assert codec.texts([ids[start:-1]]) == [item.prompt + item.response]
        first = len(ids) - int(mask.sum())
        assert mask[first:].all() and not mask[:first].any()
        # Cutting the labels off leaves the prompt, and at most the token that straddles.
        left = codec.texts([ids[start:first]])[0]
        assert left == item.prompt or (encoded.straddled == 1 and left.startswith(item.prompt))
        assert (
            codec.ids([item.prompt + item.response])[0]
            == tokenizer(item.prompt + item.response, add_special_tokens=False)["input_ids"]
        )
