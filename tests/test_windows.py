"""load_windows: the examples of load_examples, each once, a window at a time."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.errors import DataError, OptionError
from prift.text import examples as module
from prift.text.examples import TextOptions, load_examples, load_windows
from tests.toy_tokenizers import byte_level


def rows_of(count, name="a"):
    return [{"prompt": f"{name} {i}", "response": "go " * (i % 7 + 1)} for i in range(count)]


def write(folder, rows, name="a"):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read(data, rows, *, context=None, weights=None, advance=lambda amount: None, **options):
    data = [data] if isinstance(data, str) else data
    return load_windows(
        data, byte_level(), TextOptions(**options), context=context, data_weights=weights,
        rows=rows, advance=advance,
    )  # fmt: skip


def load(data, *, context=None, weights=None, **options):
    data = [data] if isinstance(data, str) else data
    return load_examples(
        data, byte_level(), TextOptions(**options), context=context, data_weights=weights
    )


def content(examples):
    return [
        (examples.where(i), one.input_ids.tolist(), one.label_mask.tolist())
        for i, one in enumerate(examples)
    ]


def files_of(parts):
    """Of each example the number of its dataset, and its file."""
    found = [examples.files() for examples in parts]
    return [names[number] for names, numbers in found for number in numbers]


def joined(windows):
    return [one for window in windows for one in content(window.examples)]


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=3), rows=st.integers(1, 40))
def test_windows_hold_the_same_examples_in_the_same_order(tmp_path_factory, counts, rows):
    folder = tmp_path_factory.mktemp("data")
    data = [write(folder, rows_of(n, c), c) for n, c in zip(counts, "abc", strict=False)]
    whole, windows = load(data, max_length=12), list(read(data, rows, max_length=12))
    assert joined(windows) == content(whole)
    assert files_of(window.examples for window in windows) == files_of([whole])
    sizes = [len(window.examples) for window in windows]
    assert sizes[:-1] == [rows] * (len(sizes) - 1) and 1 <= sizes[-1] <= rows
    assert windows[-1].examples.report == whole.report
    last = [window.last for window in windows]
    assert last == [False] * (len(sizes) - 1) + [sizes[-1] < rows]


def test_a_window_is_given_before_the_next_is_read(tmp_path):
    seen = []
    windows = read(write(tmp_path, rows_of(30)), 10, advance=seen.append)
    assert content(next(windows).examples)[-1][0] == "a.jsonl:10"
    assert seen == [10]
    next(windows)
    assert seen == [10, 10]


def test_windows_go_across_datasets_but_not_over_many_tokens(tmp_path, monkeypatch):
    data = [write(tmp_path, rows_of(7, name), name) for name in "ab"]
    assert [len(w.examples) for w in read(data, 5)] == [5, 5, 4]
    monkeypatch.setattr(module, "_MOST_TOKENS", 20)
    windows = list(read(data, 5))
    assert joined(windows) == content(load(data))
    assert all(w.examples.num_tokens - w.examples.lengths[-1] < 20 for w in windows)
    assert len(windows) > 3


def test_weights_above_one_give_each_example_once_and_count_it_often(tmp_path):
    data = [write(tmp_path, rows_of(10, name), name) for name in "ab"]
    weights = [2, 1.3]
    windows = list(read(data, 6, weights=weights))
    assert joined(windows) == content(load(data))
    assert windows[-1].examples.report == load(data, weights=weights).report


def test_a_thinned_dataset_gives_what_training_draws(tmp_path):
    data = [write(tmp_path, rows_of(n, name), name) for n, name in [(20, "a"), (31, "b")]]
    data.append(write(tmp_path, rows_of(4, "c"), "c"))
    options = {"weights": [0.25, 0.5, 1], "seed": 3, "max_length": 8, "limit": 29}
    whole, windows = load(data, **options), list(read(data, 4, **options))
    assert joined(windows) == content(whole)
    assert [len(w.examples) for w in windows[:-1]] == [4] * (len(windows) - 1)
    assert windows[-1].examples.report == whole.report
    assert len(whole) == 5 + 15 + 4


def test_a_bad_row_comes_behind_the_windows_before_it(tmp_path):
    data = write(tmp_path, [*rows_of(25), {"prompt": "a"}, *rows_of(5)])
    windows = read(data, 10)
    found = [next(windows), next(windows)]
    assert joined(found) == content(load(data, limit=20))
    with pytest.raises(DataError, match="^a.jsonl:26: no 'response' here"):
        next(windows)


EMPTY = {"prompt": "a", "response": ""}
LONG = {"prompt": "a", "response": "clips " * 40}


@pytest.mark.parametrize(
    ("unfit", "options", "message"),
    [
        (EMPTY, {}, "^3 of 66 rows have no token to train on .*: a.jsonl:26, a.jsonl:60, b.j"),
        (LONG, {"context": 30}, r"3 sequence\(s\), the longest has 44: a.jsonl:26, a.jsonl:60, b"),
        (
            {"prompt": "clips " * 50, "response": "a"},
            {"max_length": 30, "on_empty": "error"},
            "leaves 3 examples without a label: a.jsonl:26, a.jsonl:60, b.jsonl:2",
        ),
    ],
)
def test_unfit_rows_late_are_all_counted_and_nothing_more_is_given(
    tmp_path, unfit, options, message
):
    rows = rows_of(64)
    rows[25] = rows[59] = unfit
    data = [write(tmp_path, rows), write(tmp_path, [rows_of(1)[0], unfit], "b")]
    windows, found = read(data, 10, **options), []
    with pytest.raises(DataError, match=message) as told:
        for window in windows:
            found.append(window)
    assert joined(found) == content(load(data[0], limit=20))
    with pytest.raises(DataError) as whole:
        load(data, **options)
    assert str(told.value) == str(whole.value)


def test_a_thinned_dataset_behind_unfit_rows_is_counted_too(tmp_path):
    data = [write(tmp_path, [EMPTY], "a"), write(tmp_path, [*rows_of(9), EMPTY], "b")]
    with pytest.raises(DataError, match="^2 of 11 rows have no token to train on"):
        next(read(data, 3, weights=[1, 0.5]))


def test_no_data_and_odd_options(tmp_path):
    with pytest.raises(OptionError, match="no data: name a file"):
        next(read([], 5))
    with pytest.raises(OptionError, match="--limit 0 should be 1 or more"):
        next(read(write(tmp_path, rows_of(3)), 5, limit=0))
    with pytest.raises(DataError, match="holds no rows"):
        next(read(write(tmp_path, []), 5))
    with pytest.raises(DataError, match="the data weights leave none, or all were dropped"):
        next(read(write(tmp_path, rows_of(3)), 5, weights=[0.1]))


def test_the_reading_can_be_ended_from_outside(tmp_path):
    class Enough(Exception):
        pass

    def advance(amount):
        seen.append(amount)
        if len(seen) == 3:
            raise Enough

    seen: list[int] = []
    with pytest.raises(Enough):
        list(read(write(tmp_path, rows_of(50)), 10, advance=advance))
    assert seen == [10, 10, 10]


def test_examples_of_a_window_are_read_only_views(tmp_path):
    window = next(read(write(tmp_path, rows_of(3)), 5))
    with pytest.raises(ValueError, match="read-only"):
        window.examples[0].input_ids[0] = 1
    assert window.examples.lengths.dtype == np.int64
