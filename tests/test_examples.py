"""load_examples: the whole way from files to examples, its counts and its refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.errors import DataError, OptionError
from prift.roles import ROLES
from prift.text.examples import TextOptions, load_examples
from prift.text.tokenizers import load_tokenizer
from tests.toy_tokenizers import CHATML, byte_level, sentencepiece

QA = [
    {"question": "how many clips did she sell in May 2024", "answer": "72"},
    {"question": "go", "answer": "Once upon a time, there was a little car named Beep."},
    {"question": "a", "answer": "b"},
]
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


def texts(examples, tokenizer=None):
    """Each example as (what is given, what is trained)."""
    tokenizer = tokenizer or byte_level()
    return [
        (tokenizer.decode(ids[~mask]), tokenizer.decode(ids[mask]))
        for ids, mask in ((one.input_ids, one.label_mask) for one in examples)
    ]


def test_question_and_answer(tmp_path):
    examples = load(write(tmp_path, QA))
    assert texts(examples) == [
        ("how many clips did she sell in May 2024\n", "72<|endoftext|>"),
        ("go\n", "Once upon a time, there was a little car named Beep.<|endoftext|>"),
        ("a\n", "b<|endoftext|>"),
    ]
    assert (examples[0].input_ids.dtype, examples[0].label_mask.dtype) == (np.int32, np.bool_)


def test_examples_are_a_sequence_with_lengths_and_places(tmp_path):
    examples = load(write(tmp_path, QA))
    assert len(examples) == 3
    assert examples.lengths.tolist() == [len(one.input_ids) for one in examples]
    assert examples.lengths.dtype == np.int64
    assert examples.num_tokens == sum(len(one.input_ids) for one in examples)
    assert examples.num_labels == sum(int(one.label_mask.sum()) for one in examples)
    assert [examples.where(i) for i in range(3)] == ["d.jsonl:1", "d.jsonl:2", "d.jsonl:3"]
    assert examples.max_id() == max(one.input_ids.max() for one in examples)
    assert texts([examples[-1]]) == texts(examples[2:]) == [("a\n", "b<|endoftext|>")]
    with pytest.raises(IndexError):
        examples[3]
    with pytest.raises(ValueError, match="read-only"):
        examples[0].input_ids[0] = 1


def test_the_report_says_what_happened(tmp_path):
    data = write(tmp_path, QA)
    examples = load(data, max_length=12)
    assert examples.report.lines() == [
        f"{data}: format question-answer, plain",
        "3 rows -> 2 examples, 16 tokens, 12 of them labels",
        "2 sequences longer than --max-length were cut",
        "1 dropped, since the cut left no label: d.jsonl:1",
    ]


def test_a_cut_is_at_the_right_and_what_keeps_no_label_is_dropped(tmp_path):
    data = write(tmp_path, QA)
    whole, cut = load(data), load(data, max_length=12)
    assert whole.lengths.tolist() == [20, 16, 4]
    assert cut.lengths.tolist() == [12, 4]
    assert cut[0].input_ids.tolist() == whole[1].input_ids[:12].tolist()
    assert cut[0].label_mask.tolist() == whole[1].label_mask[:12].tolist()
    assert (cut.report.truncated, cut.report.dropped) == (2, ["d.jsonl:1"])
    with pytest.raises(DataError, match="--max-length 12 leaves 1 examples without a label: d.jso"):
        load(data, max_length=12, on_empty="error")


def test_sequences_over_the_context_are_an_error_that_counts_them(tmp_path):
    data = write(tmp_path, QA)
    assert len(load(data, context=20)) == 3
    with pytest.raises(DataError) as error:
        load(data, context=15)
    assert str(error.value) == (
        "longer than the model's context of 15 tokens: 2 sequence(s), the longest has 20: "
        "d.jsonl:1, d.jsonl:2. Cut them with --max-length 15"
    )
    assert load(data, context=15, max_length=15).report.truncated == 2
    with pytest.raises(OptionError, match="--max-length 16 is over the model's context of 15 tok"):
        load(data, context=15, max_length=16)


def test_rows_without_a_label_are_an_error_that_counts_them(tmp_path):
    rows = [QA[0], {"question": "a", "answer": ""}, QA[1], {"question": "b", "answer": ""}]
    with pytest.raises(DataError, match="^2 of 4 rows have no token to train on .*: d.jsonl:2, "):
        load(write(tmp_path, rows))
    untrained = {"messages": [CHAT["messages"][0]]}
    with pytest.raises(DataError, match="^1 of 2 rows have no token to train on .*: d.jsonl:2. M"):
        load(write(tmp_path, [CHAT, untrained]), byte_level(CHATML))
    masked = {"input_ids": [1, 2], "labels": [1, -100]}
    with pytest.raises(DataError, match="^1 of 1 rows have no token to train on"):
        load(write(tmp_path, [masked]))


def test_no_data_at_all(tmp_path):
    with pytest.raises(OptionError, match="no data: name a file"):
        load([])
    with pytest.raises(DataError, match="--data .*d.jsonl holds no rows"):
        load(write(tmp_path, []))
    with pytest.raises(DataError, match="the data weights leave none, or all were dropped"):
        load(write(tmp_path, QA), weights=[0.1])


def test_limit_takes_the_first_rows_of_each_dataset(tmp_path):
    data = [write(tmp_path, QA, "a.jsonl"), write(tmp_path, QA[::-1], "b.jsonl")]
    examples = load(data, limit=2)
    places = [examples.where(i) for i in range(4)]
    assert places == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    assert examples.report.rows == 4


def numbered(folder, count, name):
    rows = [{"prompt": f"{name} {i}", "response": "b"} for i in range(count)]
    return write(folder, rows, f"{name}.jsonl")


def test_data_weights_repeat_and_thin_out(tmp_path):
    data = [numbered(tmp_path, 10, name) for name in ("a", "b", "c")]
    examples = load(data, weights=[2, 0.5, 1.3])
    places = [examples.where(i) for i in range(len(examples))]
    everything = {name: [f"{name}.jsonl:{i}" for i in range(1, 11)] for name in "abc"}
    assert places[:20] == everything["a"] * 2
    half, rest = places[20:25], places[25:]
    assert half == [place for place in everything["b"] if place in half]  # in order, no repeats
    assert rest[:10] == everything["c"]
    assert len(set(rest[10:])) == len(rest[10:]) == 3
    assert len(examples.lengths) == len(examples) == 38
    assert examples.num_tokens == sum(len(one.input_ids) for one in examples)
    assert examples.report.examples == 38 and examples.report.rows == 30


def test_the_random_part_of_a_weight_depends_on_the_seed_alone(tmp_path):
    data = numbered(tmp_path, 40, "a")

    def drawn(seed, limit=None):
        examples = load(data, weights=[0.5], seed=seed, limit=limit)
        return [examples.where(i) for i in range(len(examples))]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    # The same numbers in every version of numpy, or a cache would miss what training draws.
    assert drawn(0, limit=6) == ["a.jsonl:4", "a.jsonl:5", "a.jsonl:6"]


def test_roles_of_label_tokens(tmp_path):
    """Flat over all examples in order, repeats included; and prompts that are trained too."""
    data = [write(tmp_path, QA[1:], "a.jsonl"), write(tmp_path, [CHAT], "b.jsonl")]
    for labels in ("responses", "all"):
        examples = load(data, byte_level(CHATML), weights=[2, 1], labels=labels)
        expected = [
            ROLES[role]
            for one in examples
            for role, label in zip(one.roles, one.label_mask, strict=True)
            if label
        ]
        assert [ROLES[code] for code in examples.label_roles()] == expected
        given = {"prompt", "user"} if labels == "all" else set()
        assert set(expected) == {"response", "assistant"} | given
        assert len(expected) == examples.num_labels
        assert labels != "all" or examples.num_labels == examples.num_tokens - len(examples)


def test_all_tokens_are_labels_where_prompts_are_trained_too(tmp_path):
    rows = [*QA, {"question": "b", "answer": ""}]
    whole, usual = load(write(tmp_path, rows), labels="all"), load(write(tmp_path, QA))
    ids = [[one.input_ids.tolist() for one in examples] for examples in (whole, usual)]
    assert ids[0][:3] == ids[1]
    assert whole.label_counts.tolist() == (whole.lengths - 1).tolist()
    assert whole.report.straddled == 0
    untrained = {"messages": [CHAT["messages"][0]]}
    assert len(load(write(tmp_path, [CHAT, untrained]), byte_level(CHATML), labels="all")) == 2
    barred = {"messages": [{**CHAT["messages"][0], "loss_weight": 0}]}
    with pytest.raises(DataError, match="1 of 1 rows have no token to train on"):
        load(write(tmp_path, [barred]), byte_level(CHATML), labels="all")
    with pytest.raises(OptionError, match="--labels 'prompts': there are responses and all"):
        load(write(tmp_path, QA), labels="prompts")


def test_memory_is_five_bytes_a_token(tmp_path):
    rows = [{"prompt": f"a {i} ", "response": "Once upon a time, " * 20} for i in range(600)]
    examples = load(write(tmp_path, rows), weights=[3])
    store = examples._store
    held = sum(
        sys.getsizeof(part) for part in (store.ids, store.marks, store.offsets, store.labels)
    )
    stored = examples.num_tokens / 3
    assert 5 * stored <= held < 6 * stored + 24 * len(rows)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(min_size=1, max_size=20)), min_size=1))
def test_a_batch_gives_the_same_examples_as_one_row_after_the_other(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    together = load(write(folder, rows), sentencepiece())
    for i, row in enumerate(rows):
        [alone] = load(write(folder, [row]), sentencepiece())
        assert alone.input_ids.tolist() == together[i].input_ids.tolist()
        assert alone.label_mask.tolist() == together[i].label_mask.tolist()


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, prift.text.examples; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'jinja2', 'tokenizers')"
        " if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_gsm8k_through_the_real_small_model_tokenizer(real_inputs):
    data = str(real_inputs / "datasets" / "gsm8k_train.jsonl")
    tokenizer = load_tokenizer(str(real_inputs / "models" / "stories260k"))
    examples = load(data, tokenizer, context=512, max_length=512)
    assert len(examples) == 7472
    assert examples.report.truncated == 924
    assert examples.report.dropped == ["gsm8k_train.jsonl:3332"]
    assert examples.lengths.max() == 512
