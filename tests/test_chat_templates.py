"""Turn boundaries under templates of every awkward kind, and under real ones."""

import pytest

from prift.errors import DataError
from prift.text.chat import Template, render_chat
from prift.text.encode import encode_renderings
from prift.text.formats import Chat, choose_format, read_row
from prift.text.rows import read_rows
from prift.text.tokenizers import Codec, load_tokenizer
from tests.test_chat import HI, trained_texts
from tests.toy_tokenizers import CHATML, byte_level


@pytest.mark.parametrize("inside", ["", "{{ '<|im_end|>' }}", "{{ '<|im_end|>\\n' }}"])
def test_generation_marks_wherever_they_end(inside):
    after = {"": "{{ '<|im_end|>\\n' }}", "{{ '<|im_end|>' }}": "{{ '\\n' }}"}.get(inside, "")
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}" + inside + "{% endgeneration %}"
        "{% else %}{{ m.content }}" + inside + "{% endif %}" + after + "{% endfor %}"
    )
    [(text, trained)] = trained_texts(template, HI)
    assert trained == ["How can<|im_end|>", "fast<|im_end|>"]
    assert text.endswith("<|im_start|>assistant\nfast<|im_end|>\n")
    [(_, trained)] = trained_texts(template, HI, [False, False, False, True])
    assert trained == ["fast<|im_end|>"]


def test_several_generation_marks_a_turn_are_no_turns():
    twice = "{% generation %}{{ message.content }}{% endgeneration %}"
    twice += "{% generation %}{{ '' }}{% endgeneration %}"
    template = CHATML.replace("+ message.content }}", "}}" + twice)
    assert template.count("generation %}") == 4
    [(_, trained)] = trained_texts(template, HI[:2])
    assert trained == ["How can<|im_end|>"]


DROPS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_template_that_drops_earlier_reasoning_gives_one_example_per_trained_turn():
    messages = [dict(message) for message in HI]
    messages[1]["reasoning_content"] = "hm"
    chat = Chat(messages, [False, True, False, True])
    rendered = render_chat(chat, Template(byte_level(DROPS_REASONING)))
    assert rendered.split and not rendered.unseen
    assert trained_texts(DROPS_REASONING, messages) == [
        (
            "<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\n<think>hm</think>How can<|im_end|>\n",
            ["<think>hm</think>How can<|im_end|>"],
        ),
        (
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHow can<|im_end|>\n"
            "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\nfast<|im_end|>\n",
            ["fast<|im_end|>"],
        ),
    ]


def test_nothing_is_split_where_only_the_last_turn_is_trained():
    messages = [dict(message) for message in HI]
    messages[1]["reasoning_content"] = "hm"
    rendered = render_chat(
        Chat(messages, [False, False, False, True]), Template(byte_level(DROPS_REASONING))
    )
    assert not rendered.split and len(rendered.renderings) == 1


def test_an_end_of_turn_that_is_a_newline_is_a_label():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert Template(byte_level(template)).end_of_turn == "\n"
    [(text, trained)] = trained_texts(template, HI)
    assert text == "user: Hello\nassistant: How can\nuser: go\nassistant: fast\n"
    assert trained == ["How can\n", "fast\n"]


def test_a_token_across_the_header_and_the_turn_is_counted_and_is_no_label():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    rendered = render_chat(Chat(HI[2:], [False, True]), Template(tokenizer))
    encoded = encode_renderings(rendered.renderings, Codec(tokenizer))[0]
    pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    assert pieces[-3:] == [":", "Ġfast", "Ċ"]
    assert encoded.label_mask[-3:].tolist() == [False, False, True]
    assert encoded.straddled == 1


def test_an_end_of_turn_in_plain_words_is_a_label_without_its_newline():
    template = (
        "{% for m in messages %}{{ '## ' + m.role + '\\n' + m.content + ' ## End\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '## assistant\\n' }}{% endif %}"
    )
    assert trained_texts(template, HI)[0][1] == ["How can ## End", "fast ## End"]


def test_a_template_that_ends_no_turn_is_ended_by_eos():
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    tokenizer = byte_level(template)
    for trained, ended in (([False, True], True), ([True, False], False)):
        messages = HI[:2] if ended else HI[1:3]
        rendered = render_chat(Chat(messages, trained), Template(tokenizer)).renderings[0]
        assert rendered.add_eos == ended
    encoded = encode_renderings(
        render_chat(Chat(HI[:2], [False, True]), Template(tokenizer)).renderings, Codec(tokenizer)
    )[0]
    trained = encoded.input_ids[encoded.label_mask].tolist()
    assert tokenizer.decode(trained) == "How can<|endoftext|>"


def test_a_template_that_ends_the_conversation_too():
    """Phi-3's closes each turn and, where it opens none, the whole."""
    closing = "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    examples = trained_texts(CHATML + closing, HI)
    assert [trained for _, trained in examples] == [
        ["How can<|im_end|>\n<|endoftext|>"],
        ["fast<|im_end|>\n<|endoftext|>"],
    ]
    with pytest.raises(DataError, match="turn 1: what the chat template writes to let the assist"):
        trained_texts(CHATML + closing, HI[1:3])


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "mistral-v0.1-chatml"])
@pytest.mark.parametrize(
    "file",
    [
        "glaive_toolcall_en_demo.json",
        "s1k_gptoss20b_low.jsonl",
        "reason_tool_use_demo_50.jsonl",
        "v1_sft_demo.jsonl",
    ],
)
def test_real_conversations_under_real_templates(real_inputs, name, file):
    """Labels decode to each trained turn's content and <|im_end|>; the ids are the template's."""
    tokenizer = load_tokenizer(str(real_inputs / "tokenizers" / name))
    template, codec = Template(tokenizer), Codec(tokenizer)
    for row, _ in zip(read_rows(str(real_inputs / "datasets" / file)), range(50), strict=False):
        chat = read_row(choose_format("auto", row.data), row.data)
        calls = any(message.get("tool_calls") for message in chat.messages)
        if calls and name.startswith("mistral"):
            with pytest.raises(DataError, match="does not render tool calls"):
                render_chat(chat, template)
            continue
        rendered = render_chat(chat, template)
        assert not rendered.split
        encoded = encode_renderings(rendered.renderings, codec)[0]
        ids, mask = encoded.input_ids.tolist(), encoded.label_mask
        assert ids == tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, tokenize=True, return_dict=False
        )
        assert encoded.straddled == 0
        labels = codec.texts([[i for i, label in zip(ids, mask, strict=True) if label]])[0]
        turns = labels.split("<|im_end|>")
        assert turns.pop() == ""
        said = [m for m, t in zip(chat.messages, chat.trained, strict=True) if t]
        assert len(turns) == len(said)
        for turn, message in zip(turns, said, strict=True):
            if message.get("tool_calls"):
                assert turn.startswith(message["content"] + "<tool_call>")
                assert turn.count("</tool_call>") == len(message["tool_calls"])
            else:
                assert turn.removeprefix(" ") == message["content"].removeprefix(" ")
