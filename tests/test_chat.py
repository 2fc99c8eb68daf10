"""Conversations -> templated text and labels, with templates of every awkward kind."""

import pytest

from prift.errors import DataError
from prift.text.chat import Template, render_chat, with_system
from prift.text.encode import encode_renderings
from prift.text.formats import Chat
from prift.text.tokenizers import Codec
from tests.toy_tokenizers import CHATML, byte_level, trimming

HI = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "How can"},
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "fast"},
]


def trained_texts(template, messages, trained=None, tools=None, make=byte_level):
    """For each example of the conversation: (its text, its trained pieces of text)."""
    trained = trained or [message["role"] == "assistant" for message in messages]
    rendered = render_chat(Chat(messages, trained, tools), Template(make(template)))
    return [(one.text, [one.text[a:b] for a, b in one.trained]) for one in rendered.renderings]


def test_chatml_trains_the_assistants_tokens_and_the_end_of_turn_without_its_newline():
    text = (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHow can<|im_end|>\n"
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\nfast<|im_end|>\n"
    )
    assert trained_texts(CHATML, HI) == [(text, ["How can<|im_end|>", "fast<|im_end|>"])]


def test_the_ids_are_the_template_alone_and_the_labels_are_whole_tokens():
    tokenizer = trimming(CHATML)  # adds BOS to plain text; a template writes its own or none
    rendered = render_chat(Chat(HI, [False, True, False, True]), Template(tokenizer))
    encoded = encode_renderings(rendered.renderings, Codec(tokenizer))[0]
    ids = encoded.input_ids.tolist()
    assert ids == tokenizer.apply_chat_template(HI, tokenize=True, return_dict=False)
    assert tokenizer.decode([i for i, m in zip(ids, encoded.label_mask, strict=True) if m]) == (
        "How can<|im_end|>fast<|im_end|>"
    )
    assert encoded.straddled == 0


def test_only_trained_turns_are_labels():
    [(_, trained)] = trained_texts(CHATML, HI, [False, False, False, True])
    assert trained == ["fast<|im_end|>"]


def test_content_that_ends_in_white_space_keeps_it():
    messages = [HI[0], {"role": "assistant", "content": "Hello \n"}]
    assert trained_texts(CHATML, messages)[0][1] == ["Hello \n<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant():
    [(text, trained)] = trained_texts(CHATML, HI[1:3])
    assert text.startswith("<|im_start|>assistant\nHow")
    assert trained == ["How can<|im_end|>"]


def test_messages_behind_the_last_trained_turn_stay():
    [(text, trained)] = trained_texts(CHATML, HI[:3])
    assert text.endswith("<|im_start|>user\ngo<|im_end|>\n")
    assert trained == ["How can<|im_end|>"]


CALL = {"type": "function", "function": {"name": "area", "arguments": {"side": 3}}}


def test_tool_calls_are_trained():
    messages = [HI[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, HI[2], HI[3]]
    [(_, trained)] = trained_texts(CHATML, messages)
    assert trained == ['<tool_call>area{"side": 3}<|im_end|>', "fast<|im_end|>"]


NO_TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_template_that_loses_tool_calls_is_refused():
    messages = [HI[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(DataError, match="turn 2 calls the tool 'area', but the chat template does"):
        trained_texts(NO_TOOLS, messages)


def test_what_else_a_template_leaves_out_is_said():
    messages = [HI[0], {"role": "assistant", "content": "a", "reasoning_content": "because"}]
    rendered = render_chat(Chat(messages, [False, True], [CALL]), Template(byte_level(NO_TOOLS)))
    assert rendered.unseen == {"reasoning", "tools"}


def test_tools_and_reasoning_reach_the_template():
    template = (
        "{% if tools %}{{ tools[0].function.name }}{% endif %}{{ bos_token }}"
        "{% for m in messages %}{{ '|' + (m.reasoning_content or '') + (m.thinking or '') }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '|' }}{% endif %}"
    )
    messages = [HI[0], {"role": "assistant", "content": "a", "reasoning_content": "b"}]
    assert trained_texts(template, messages, tools=[CALL], make=trimming) == [
        ("area<s>|Hello|bba", ["bba"])
    ]


def test_a_template_that_writes_todays_date_writes_the_same_on_any_day():
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    [(text, _)] = trained_texts(template, HI)
    assert text.startswith("01 Jan 2025<|im_start|>user")


def test_named_templates():
    tokenizer = byte_level({"default": CHATML, "tool_use": "{{ tools[0].function.name }}" + CHATML})
    chat = Chat(HI[:2], [False, True], [CALL])
    text = render_chat(chat, Template(tokenizer)).renderings[0].text
    assert text.startswith("area<|im_start|>user")


def test_system_is_added_where_there_is_none():
    chat = Chat(HI[:2], [False, True], [CALL])
    assert with_system(chat, None) is chat
    added = with_system(chat, "Be brief.")
    assert added.messages[0] == {"role": "system", "content": "Be brief."}
    assert (added.trained, added.tools) == ([None, False, True], [CALL])
    assert with_system(added, "Be long.") is added


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("", HI, "has no chat template, which messages need: give one with --chat-template FILE"),
        (None, HI, "or name a tokenizer that has one with --tokenizer"),
        (
            "{{ raise_exception('Roles must alternate!') }}",
            HI,
            "cannot render this: Roles must",
        ),
        ("{% for m in messages %}", HI, "cannot render this: Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", HI, "cannot render this: can only concatenate str"),
        (
            CHATML,
            [HI[0], {"role": "assistant", "content": ""}],
            "turn 2 is a trained assistant turn with nothing in it",
        ),
        (
            CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>"),
            HI,
            "turn 2: what the chat template writes to let the assistant speak is no prefix",
        ),
    ],
)
def test_what_cannot_be_templated_says_why(template, messages, message):
    with pytest.raises(DataError, match=message):
        trained_texts(template, messages)
