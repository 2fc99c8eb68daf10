"""--labels all: whose words every character of a templated conversation is, and that each is
trained once."""

import pytest

from prift.errors import DataError
from prift.roles import PROMPT, ROLES
from prift.text.chat import Template, render_chat
from prift.text.formats import Chat, choose_format, read_row
from prift.text.rows import read_rows
from prift.text.tokenizers import load_tokenizer
from tests.test_chat import HI
from tests.test_chat_templates import DROPS_REASONING
from tests.toy_tokenizers import CHATML, byte_level

SYSTEM, TOOL = {"role": "system", "content": "Beep"}, {"role": "tool", "content": "72"}


def pieces(template, messages, trained=None, everything=True):
    """For each text of the conversation: (role, characters), upper case where they are trained."""
    trained = trained or [m["role"] == "assistant" or None for m in messages]
    rendered = render_chat(Chat(messages, trained), Template(byte_level(template)), everything)
    return [list(_pieces(one)) for one in rendered.renderings]


def _pieces(one):
    """Character by character: no use is made of how the spans were found."""
    before, held = None, ""
    for place, character in enumerate([*one.text, None]):
        code = PROMPT
        for begin, role in one.roles:
            code = role if begin <= place else code
        own = ROLES[code].upper() if any(a <= place < b for a, b in one.trained) else ROLES[code]
        if held and (own != before or character is None):
            yield before, held
            held = ""
        before, held = own, held + (character or "")


def said(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def test_every_turn_and_what_is_between():
    messages = [SYSTEM, *HI[:2], TOOL, HI[3]]
    assert pieces(CHATML, messages) == [
        [
            ("SYSTEM", said("system", "Beep")),
            ("USER", said("user", "Hello")),
            ("PROMPT", "<|im_start|>assistant\n"),
            ("ASSISTANT", "How can<|im_end|>"),
            ("PROMPT", "\n"),
            ("TOOL", said("tool", "72")),
            ("PROMPT", "<|im_start|>assistant\n"),
            ("ASSISTANT", "fast<|im_end|>"),
            ("PROMPT", "\n"),
        ]
    ]


def test_responses_alone_have_the_same_words_as_labels():
    [found] = pieces(CHATML, [SYSTEM, *HI], everything=False)
    labels = [(role, text) for role, text in found if role.isupper()]
    assert labels == [("ASSISTANT", "How can<|im_end|>"), ("ASSISTANT", "fast<|im_end|>")]
    [whole] = pieces(CHATML, [SYSTEM, *HI])
    assert labels == [(role, text) for role, text in whole if role == "ASSISTANT"]


def test_turns_that_the_row_bars_are_not_trained():
    """An untrained turn of a prompt (None) is; one of weight 0 (False) is not."""
    [found] = pieces(CHATML, HI, [False, False, None, None])
    assert found == [
        ("user", said("user", "Hello")),
        ("PROMPT", "<|im_start|>assistant\n"),
        ("assistant", "How can<|im_end|>"),
        ("PROMPT", "\n"),
        ("USER", said("user", "go")),
        ("PROMPT", "<|im_start|>assistant\n"),
        ("ASSISTANT", "fast<|im_end|>"),
        ("PROMPT", "\n"),
    ]


def test_a_conversation_that_begins_with_an_untrained_assistant():
    [found] = pieces(CHATML, HI[1:], [False, None, True])
    assert found[:3] == [
        ("PROMPT", "<|im_start|>assistant\n"),
        ("assistant", "How can<|im_end|>"),
        ("PROMPT", "\n"),
    ]


SYSTEM_LAST = (  # Mistral's writes the system's words into the last turn of the user
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0].content + '\\n' %}{% else %}{% set rest = messages %}"
    "{% set system = '' %}{% endif %}"
    "{% set last = namespace(at=0) %}{% for m in rest %}{% if m.role == 'user' %}"
    "{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (system if loop.index0 == last.at else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "first", "user"),
    [
        (DROPS_REASONING, None, said("user", "go")),
        (SYSTEM_LAST, SYSTEM, "[INST]Beep\ngo[/INST]"),
        # Phi-3's: where its end of turn ends cannot be told, only where the contents begin
        (CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}", None,
         "go<|im_end|>\n<|im_start|>assistant\n"),
    ],
)  # fmt: skip
def test_a_conversation_that_is_split_trains_each_turn_once(template, first, user):
    messages = [dict(m) for m in ([first] if first else []) + HI]
    messages[-3]["reasoning_content"] = "hm"
    one, two = pieces(template, messages)
    assert "Hello" in "".join(text for role, text in one if role in ("USER", "SYSTEM"))
    assert [text for role, text in one if role == "ASSISTANT"][0].count("How can") == 1
    trained = [(role, text) for role, text in two if role.isupper() and role != "PROMPT"]
    assert trained[0] == ("USER", user) and trained[1][1].startswith("fast")
    assert "Hello" not in "".join(t for r, t in two if r.isupper())
    assert "How can" not in "".join(t for r, t in two if r.isupper())


@pytest.mark.parametrize("last", ["user", "assistant"])
def test_what_is_behind_the_last_trained_turn_is_trained_too(last):
    """A turn that nobody answers, and one that the row bars; in a part of its own, once."""
    messages = [dict(m) for m in HI] + [{"role": last, "content": "bye"}]
    messages[1]["reasoning_content"] = "hm"
    trained = [None, True, None, True, None if last == "user" else False]
    parts = pieces(DROPS_REASONING, messages, trained)
    assert len(parts) == 3
    behind = [(role, text) for role, text in parts[2] if role.isupper()]
    if last == "user":
        assert behind == [("USER", said("user", "bye"))]
    else:
        assert behind == [("PROMPT", "<|im_start|>assistant\n"), ("PROMPT", "\n")]
    every = "".join(text for part in parts for role, text in part if role.isupper())
    assert [every.count(word) for word in ("Hello", "How can", "go<", "fast")] == [1] * 4
    lines = sum(said(m["role"], m["content"]).count("\n") for m in messages)
    assert every.count("\n") == lines


def test_a_turn_that_cannot_be_told_is_refused():
    """A system message, barred, that is somewhere inside the user's."""
    with pytest.raises(DataError, match=r"^turn 1: where it begins and ends .* --labels all"):
        pieces(SYSTEM_LAST, [SYSTEM, *HI], [False, None, True, None, True])


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "mistral-v0.1-chatml"])
@pytest.mark.parametrize("file", ["glaive_toolcall_en_demo.json", "v1_sft_demo.jsonl"])
def test_real_conversations(real_inputs, name, file):
    """Under real templates every content is trained under its own role."""
    template = Template(load_tokenizer(str(real_inputs / "tokenizers" / name)))
    seen = set()
    for row, _ in zip(read_rows(str(real_inputs / "datasets" / file)), range(40), strict=False):
        chat = read_row(choose_format("auto", row.data), row.data)
        if any(m.get("tool_calls") for m in chat.messages) and name.startswith("mistral"):
            continue
        [one] = render_chat(chat, template, everything=True).renderings
        assert (one.trained == [(0, len(one.text))]) == (False not in chat.trained)
        found = [piece for piece in _pieces(one) if piece[0].lower() != "prompt"]
        for message, trained in zip(chat.messages, chat.trained, strict=True):
            role, text = message["role"], message["content"].strip()
            role = role if trained is False else role.upper()
            seen.add(role)
            while found and not (found[0][0] == role and text in found[0][1]):
                found.pop(0)
            assert found, (row.where, message)
    assert "ASSISTANT" in seen and seen & {"USER", "user"}
