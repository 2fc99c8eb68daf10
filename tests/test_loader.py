"""What --template, --system, --limit and odd rows do to the examples, and how it is said."""

import json

import pytest

from prift.errors import DataError, OptionError
from prift.text.examples import TextOptions, load_examples
from tests.toy_tokenizers import CHATML, byte_level, sentencepiece, trimming

QA = [{"question": "go", "answer": "Beep"}, {"question": "a", "answer": "b"}]
CHAT = {
    "messages": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "How can I help you today?"},
    ]
}


def write(folder, rows, name="d.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def load(data, tokenizer=None, *, context=None, weights=None, **options):
    data = [data] if isinstance(data, str) else data
    tokenizer = tokenizer or byte_level()
    return load_examples(
        data, tokenizer, TextOptions(**options), context=context, data_weights=weights
    )


def test_messages_go_through_the_chat_template(tmp_path):
    tokenizer = trimming(CHATML)
    examples = load(write(tmp_path, [CHAT]), tokenizer)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHow can I help you today?"
    assert tokenizer.decode(examples[0].input_ids) == text + "<|im_end|>\n"
    trained = examples[0].input_ids[examples[0].label_mask]
    assert tokenizer.decode(trained) == "How can I help you today?<|im_end|>"
    assert examples.report.formats == {str(tmp_path / "d.jsonl"): "messages, chat template"}


def test_template_chat_makes_a_turn_of_the_question(tmp_path):
    tokenizer = byte_level(CHATML)
    examples = load(write(tmp_path, QA[1:]), tokenizer, template="chat", system="go")
    text = (
        "<|im_start|>system\ngo<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert tokenizer.decode(examples[0].input_ids) == text


def test_template_plain_is_what_prompts_have_anyway(tmp_path):
    data = write(tmp_path, QA)
    plain, whatever = load(data, template="plain"), load(data)
    assert [one.input_ids.tolist() for one in plain] == [one.input_ids.tolist() for one in whatever]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (CHAT, {"template": "plain"}, "d.jsonl:1: --template plain cannot be had for the format m"),
        ({"text": "a"}, {"template": "chat"}, "--template chat cannot be had for the format text"),
        (
            {"input_ids": [1, 2], "labels": [1, 2]},
            {"template": "plain"},
            "--template plain cannot be had for the format tokens",
        ),
        (QA[0], {"system": "go"}, "--system needs a chat template, but the format question-answer"),
        (QA[0], {"format": "qa"}, "unknown --format 'qa'; there are auto, "),
        (QA[0], {"template": "no"}, "--template 'no': there are chat and plain"),
        (QA[0], {"on_empty": "skip"}, "--on-empty 'skip': there are drop and error"),
        (QA[0], {"max_length": 1}, "--max-length 1 should be 2 or more"),
        (QA[0], {"limit": 0}, "--limit 0 should be 1 or more"),
        (QA[0], {"weights": [1, 2]}, "2 --data-weight for 1 --data: give one for each, or none"),
        (QA[0], {"weights": [0.0]}, "--data-weight 0.0 should be a number above 0"),
        (QA[0], {"weights": [float("nan")]}, "--data-weight nan should be a number above 0"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, row, options, message):
    with pytest.raises(OptionError, match=message):
        load(write(tmp_path, [row]), byte_level(CHATML), **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"ask": "a", "tell": "b"}], "^d.jsonl:1: no format fits the columns found: ask, tell"),
        ([QA[0], {"question": "a"}], "^d.jsonl:2: no 'answer' here: columns found: question; the"),
        ([CHAT], "^d.jsonl:1: .* has no chat template, which messages need: give one with --chat"),
    ],
)
def test_errors_name_file_and_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, rows))


def test_datasets_of_several_formats_are_read_one_after_the_other(tmp_path):
    tokenizer = byte_level(CHATML)
    pair = {"prompt": "a ", "completion": "b"}
    turns = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    data = [
        write(tmp_path, [CHAT], "chat.jsonl"),
        write(tmp_path, [pair, turns, pair], "mixed.jsonl"),
        write(tmp_path, [{"input_ids": [7, 8], "labels": [-100, 8]}], "ids.jsonl"),
    ]
    examples = load(data, tokenizer)
    assert [examples.where(i) for i in range(5)] == [
        "chat.jsonl:1",
        "mixed.jsonl:1",
        "mixed.jsonl:2",
        "mixed.jsonl:3",
        "ids.jsonl:1",
    ]
    assert examples[0].input_ids.tolist() == examples[2].input_ids.tolist()
    assert tokenizer.decode(examples[1].input_ids) == "a b<|endoftext|>"
    assert examples[4].input_ids.tolist() == [7, 8]


def test_a_split_conversation_gives_several_examples_of_one_place(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    two = {"messages": CHAT["messages"] * 2}
    examples = load(write(tmp_path, [two, CHAT]), tokenizer)
    assert [examples.where(i) for i in range(3)] == ["d.jsonl:1", "d.jsonl:1", "d.jsonl:2"]
    assert examples.report.split == 1
    assert "1 conversations were split into one example per trained turn" in "\n".join(
        examples.report.lines()
    )


def test_straddling_tokens_and_what_a_template_leaves_out_are_counted(tmp_path):
    examples = load(write(tmp_path, [{"prompt": "Once ", "response": "upon a"}]), sentencepiece())
    assert examples.report.straddled == 1
    assert "1 tokens straddle the edge of what is trained, and are no labels" in (
        examples.report.lines()
    )
    row = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "a", "reasoning_content": "because"},
        ],
        "tools": [{"name": "area"}],
    }
    report = load(write(tmp_path, [row]), byte_level(CHATML)).report
    assert (report.unseen_reasoning, report.unseen_tools) == (1, 1)
    assert report.lines()[-2:] == [
        "1 conversations have reasoning that the chat template does not render",
        "1 conversations have tools that the chat template does not render",
    ]


def test_a_tokenizer_without_eos_is_said(tmp_path):
    tokenizer = byte_level()
    tokenizer.eos_token = None
    report = load(write(tmp_path, QA), tokenizer).report
    assert report.lines()[-1] == "the tokenizer has no EOS token, so none ends the examples"
