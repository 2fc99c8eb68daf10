"""Rows -> Plain, Chat or Tokens; each format's wording, roles and refusals."""

import json
import re
from pathlib import Path

import pytest

from prift.errors import DataError, OptionError
from prift.text.formats import FORMATS, Chat, Plain, Tokens, choose_format, read_row
from prift.text.messages import ROLES
from prift.text.rows import read_rows


def read(name, row):
    return read_row(FORMATS[name], row)


def auto(row):
    return read_row(choose_format("auto", row), row)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("row", "item"),
    [
        ({"prompt": "a ", "completion": "b"}, Plain("a ", "b", user="a ")),
        ({"prompt": "a", "response": " b"}, Plain("a", " b", user="a")),
        ({"question": "1+1?", "answer": "2"}, Plain("1+1?\n", "2", user="1+1?")),
        ({"text": "abc"}, Plain("", "abc")),
        ({"text": "abc", "id": 7, "url": "http://"}, Plain("", "abc")),
        (
            {"instruction": "Add {x}.", "input": "1 and 2", "output": "3"},
            Plain(
                "Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nAdd {x}.\n\n### Input:\n1 and 2\n\n### Response:\n",
                "3",
                user="Add {x}.\n\n1 and 2",
            ),
        ),
        (
            {"instruction": "Sing.", "input": "", "output": "La."},
            Plain(
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n"
                "### Instruction:\nSing.\n\n### Response:\n",
                "La.",
                user="Sing.",
            ),
        ),
        (
            {"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]},
            Chat([turn("user", "a"), turn("assistant", "b")], [None, True]),
        ),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]},
            Chat(
                [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
                [None, True, None],
            ),
        ),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, Tokens([5, 6, 7], [-100, 6, 7])),
        (
            {"input_ids": [5, 6, 0], "labels": [-100, 6, -100], "attention_mask": [1, 1, 0]},
            Tokens([5, 6], [-100, 6]),
        ),
        (
            {"input_ids": [5, 6], "labels": [5, 6], "position_ids": [0, 1]},
            Tokens([5, 6], [5, 6]),
        ),
    ],
)
def test_one_row_of_each_format_chosen_by_its_columns(row, item):
    assert auto(row) == item


def test_the_prompt_of_conversational_prompt_completion_is_not_trained():
    chat = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    item = read("prompt-completion", {"prompt": chat, "completion": [turn("assistant", "d")]})
    assert item.trained == [None, None, None, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "response": "b"}, "'prompt' should be a string; found 3"),
        ({"prompt": "a", "response": None}, "no 'response' here: columns found: prompt, response"),
        ({"question": "a", "answer": ["b"]}, r"'answer' should be a string; found \['b'\]"),
        ({"text": "\ud83d"}, r"'text' holds half a surrogate pair \(character 0\)"),
        ({"prompt": "a", "response": "b", "images": ["x.png"]}, "the row carries 'images'; prift"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "no place for 'history'"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids, 1 labels and an attention_mask of 2"),
        (
            {"input_ids": [1, 2], "labels": [-100, 3]},
            r"labels\[1\] is 3 where the token is 2; a",
        ),
        (
            {"input_ids": [1, "b"], "labels": [-100, -100]},
            r"input_ids is \[1, 'b'\], where a list of whole",
        ),
        ({"input_ids": [1, -2], "labels": [-100, -2]}, r"input_ids\[1\] is -2, which is no token"),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [0, 1]},
            "attention_mask has holes",
        ),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]},
            r"labels\[1\] is 2 where",
        ),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0, 5]},
            "its own position_ids",
        ),
        ({"input_ids": [1], "labels": [1], "pixel_values": [[0.5]]}, "carries 'pixel_values'"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(row, message):
    with pytest.raises(DataError, match=message):
        auto(row)


def test_auto_lists_what_was_found_and_what_each_format_wants():
    with pytest.raises(DataError) as error:
        choose_format("auto", ["text", "code", "task_id"])
    assert "no format fits the columns found: text, code, task_id." in str(error.value)
    for one in FORMATS.values():
        assert f"\n  {one.name}: {', '.join(one.columns)}" in str(error.value)
    assert choose_format("text", ["text", "code", "task_id"]).name == "text"


def test_auto_refuses_to_choose_between_two():
    columns = ["prompt", "response", "completion"]
    with pytest.raises(DataError, match=r"several formats fit \(prompt-completion, prompt-respon"):
        choose_format("auto", columns)
    assert choose_format("prompt-response", columns).name == "prompt-response"


def test_an_unknown_format():
    with pytest.raises(OptionError, match="unknown --format 'alpacca'; there are auto, prompt-com"):
        choose_format("alpacca", ["instruction"])


def test_a_named_format_says_what_a_row_lacks():
    with pytest.raises(DataError, match=r"no 'question' and no 'answer' here: columns found: q, a"):
        read("question-answer", {"q": 1, "a": 2})


def test_every_format_and_every_role_has_its_place_in_the_docs():
    page = Path(__file__).parents[1].joinpath("docs", "formats.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `([^`]+)`", page, re.MULTILINE)
    assert headings == list(FORMATS)
    assert all(f"`{role}`" in page for role in ROLES)
    examples = re.findall(r"^### `([^`]+)`.*?^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in examples] == list(FORMATS)
    for name, example in examples:
        assert choose_format("auto", json.loads(example)).name == name
        auto(json.loads(example))


@pytest.mark.parametrize(
    ("file", "name", "count"),
    [
        ("gsm8k_train.jsonl", "question-answer", 7473),
        ("alpaca_en_demo.json", "alpaca", 999),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("s1k_gptoss20b_low.jsonl", "messages", 976),
        ("reason_tool_use_demo_50.jsonl", "messages", 50),
        ("v1_sft_demo.jsonl", "messages", 500),
        ("tinystories_prompt_response.jsonl", "prompt-response", 575),
    ],
)
def test_real_datasets_load_wholly(real_inputs, file, name, count):
    rows = list(read_rows(str(real_inputs / "datasets" / file)))
    chosen = choose_format("auto", rows[0].data)
    items = [read_row(chosen, row.data) for row in rows]
    assert (chosen.name, len(items)) == (name, count)


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("mbpp.jsonl", "text, code, task_id, test_setup_code, test_list, challenge_test_list"),
        ("pubmedqa_pqal.jsonl", "id, QUESTION, CONTEXTS, LABELS, MESHES, YEAR"),
    ],
)
def test_real_task_sets_say_which_columns_were_found(real_inputs, file, columns):
    row = next(read_rows(str(real_inputs / "datasets" / file)))
    with pytest.raises(DataError, match=f"no format fits the columns found: {columns}"):
        choose_format("auto", row.data)
