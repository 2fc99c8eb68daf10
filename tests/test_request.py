"""What examples ask of a cache, and reading it."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prift.cache import PriorCache, sequence_key
from prift.errors import MissingPrior
from prift.request import Request, read_prior, request
from prift.roles import PROMPT, RESPONSE
from prift.store import spans
from prift.store.writer import CacheWriter
from prift.text.encode import Encoded
from prift.text.examples import Examples
from prift.text.loader import Store
from prift.text.report import Report
from prift.text.rows import Row
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY, keys, runs


def examples(*rows, order=None) -> Examples:
    """Examples of (ids, mask as a string of 0 and 1), from lines 1, 2, ... of d.jsonl."""
    store = Store()
    for line, (ids, mask) in enumerate(rows, 1):
        labels = np.array([c == "1" for c in mask])
        roles = np.where(labels, RESPONSE, PROMPT).astype(np.uint8)
        store.add(Encoded(np.array(ids, np.int32), labels, roles), Row("d.jsonl", line, {}), 0)
    return Examples(store, np.arange(len(rows)) if order is None else np.array(order), Report())


def plain(asked: Request):
    return asked.keys.tolist(), [s.tolist() for s in asked.spans], asked.index.tolist()


def test_label_positions_are_asked_for():
    asked = request(examples(([5, 6, 7, 8], "0110"), ([5, 6, 9], "001")))
    expected = [sequence_key(np.array(ids, np.int32)) for ids in ([5, 6, 7, 8], [5, 6, 9])]
    assert asked.keys.tolist() == [k.rstrip(b"\0") for k in expected]
    assert [s.tolist() for s in asked.spans] == [[1, 3], [2, 3]]
    assert asked.index.tolist() == [0, 1]
    assert asked.num_positions == 3
    assert asked.keys.dtype == "S16"


def test_all_positions_but_the_first():
    asked = request(examples(([5, 6, 7, 8], "0110"), ([5, 6, 9], "001")), "all")
    assert [s.tolist() for s in asked.spans] == [[1, 4], [1, 3]]


def test_equal_sequences_are_united_whatever_their_labels():
    asked = request(
        examples(
            ([5, 6, 7, 8], "0100"),
            ([1, 2], "01"),
            ([5, 6, 7, 8], "0001"),
            ([5, 6, 7, 8], "0100"),
            ([1, 2], "01"),
            ([3, 4], "01"),
        )
    )
    united = asked.united()
    assert united.index.tolist() == [0, 1, 5]
    assert [s.tolist() for s in united.spans] == [[1, 2, 3, 4], [1, 2], [1, 2]]
    assert united.keys.tolist() == asked.keys[[0, 1, 5]].tolist()
    assert united.num_positions == 4
    assert plain(united.united()) == plain(united)


def test_uniting_leaves_the_request_as_it_was():
    asked = request(examples(([5, 6, 7], "010"), ([5, 6, 7], "001")))
    asked.united()
    assert [s.tolist() for s in asked.spans] == [[1, 2], [2, 3]]


MASKS = st.lists(st.booleans(), min_size=1, max_size=6).filter(any)


@given(rows=st.lists(st.tuples(st.sampled_from("abc"), MASKS), max_size=8))
def test_a_united_row_asks_for_all_that_its_copies_ask_for(rows):
    wanted = [spans.spans_of(np.array([False, *mask])) for _, mask in rows]
    asked = Request(keys(*(name for name, _ in rows)), wanted, np.arange(len(rows)))
    united = asked.united()
    expected: dict[bytes, set] = {}
    for name, runs_ in zip(asked.keys.tolist(), wanted, strict=True):
        expected.setdefault(name, set()).update(spans.positions_of(runs_).tolist())
    assert united.keys.tolist() == list(expected)  # in the order of their first copies
    for runs_, positions in zip(united.spans, expected.values(), strict=True):
        assert spans.valid(runs_, 99)
        assert spans.positions_of(runs_).tolist() == sorted(positions)


def test_subset():
    asked = request(examples(([1, 2], "01"), ([3, 4], "01"), ([5, 6], "01")))
    kept = asked.subset([2, 0])
    assert kept.index.tolist() == [2, 0]
    assert kept.keys.tolist() == asked.keys[[2, 0]].tolist()
    assert len(asked.subset([]).keys) == asked.subset([]).num_positions == 0


def stored(root, rows) -> PriorCache:
    """A cache with these rows of (ids, runs, ranks)."""
    with CacheWriter(root, IDENTITY, {}) as writer:
        for ids, runs_, ranks in rows:
            found = sequence_key(np.array(ids, np.int32))
            writer.add(found, len(ids), runs_, fx.stats(ranks))
    return PriorCache(root, IDENTITY)


def test_read_prior_joins_the_label_tokens_of_all_examples(tmp_path):
    cache = stored(
        tmp_path, [([5, 6, 7, 8], runs(1, 4), [11, 12, 13]), ([1, 2, 3], runs(1, 3), [21, 22])]
    )
    three = examples(([1, 2, 3], "001"), ([5, 6, 7, 8], "0101"), ([1, 2, 3], "011"))
    found = read_prior(cache, three, request(three), ("rank", "logprob"), "prift precompute ...")
    assert found["rank"].tolist() == [22, 11, 13, 21, 22]
    assert found["logprob"].tolist() == [-2.75, -1.375, -1.625, -2.625, -2.75]
    repeated = examples(([1, 2, 3], "001"), ([5, 6, 7, 8], "0101"), order=[1, 0, 1])
    found = read_prior(cache, repeated, request(repeated), ("rank",), "prift precompute ...")
    assert found["rank"].tolist() == [11, 13, 22, 11, 13]


def test_read_prior_names_the_first_example_that_lacks_a_row_and_the_command(tmp_path):
    cache = stored(tmp_path, [([5, 6, 7, 8], runs(1, 3), [11, 12])])
    rows = examples(([5, 6, 7, 8], "0110"), ([5, 6, 7, 8], "0001"), ([9, 9], "01"))
    message = (
        f"2 of 3 sequences have no prior in {cache.folder} (first: d.jsonl:2). Run:\n"
        "  prift precompute --model m"
    )
    with pytest.raises(MissingPrior, match="^" + re.escape(message) + "$"):
        read_prior(cache, rows, request(rows), ("rank",), "prift precompute --model m")


def test_what_is_asked_for_is_what_is_stored_and_read(tmp_path):
    """The round of both commands: request, unite, score what is missing, read."""
    rows = examples(([5, 6, 7, 8], "0100"), ([5, 6, 7, 8], "0011"), ([1, 2], "01"))
    wanted = request(rows).united()
    cache = PriorCache(tmp_path, IDENTITY)
    todo = wanted.subset(cache.missing(wanted.keys, wanted.spans, CORE))
    assert len(todo.keys) == 2
    with CacheWriter(tmp_path, IDENTITY, {}) as writer:
        for number, (name, runs_) in enumerate(zip(todo.keys, todo.spans, strict=True)):
            ranks = 10 * number + spans.positions_of(runs_)
            writer.add(name, len(rows[todo.index[number]].input_ids), runs_, fx.stats(ranks))
    cache = PriorCache(tmp_path, IDENTITY)
    assert cache.missing(wanted.keys, wanted.spans, CORE) == []
    assert read_prior(cache, rows, request(rows), ("rank",), "-")["rank"].tolist() == [1, 2, 3, 11]
