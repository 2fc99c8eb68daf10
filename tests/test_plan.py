"""What of each window is scored: nothing twice, and whatever a reader may ask for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.cache import PriorCache, sequence_key
from prift.plan import Planner
from prift.request import request
from prift.roles import PROMPT, RESPONSE
from prift.store import spans
from prift.store.writer import CacheWriter
from prift.text.encode import Encoded
from prift.text.examples import Examples, Window
from prift.text.loader import Store
from prift.text.report import Report
from prift.text.rows import Row
from tests import cache_fixtures as fx
from tests.cache_fixtures import CORE, IDENTITY


def window(*rows) -> Window:
    """Of (ids, mask as a string of 0 and 1)."""
    store = Store()
    for line, (ids, mask) in enumerate(rows, 1):
        labels = np.array([c == "1" for c in mask])
        roles = np.where(labels, RESPONSE, PROMPT).astype(np.uint8)
        store.add(Encoded(np.array(ids, np.int32), labels, roles), Row("d.jsonl", line, {}), 0)
    return Window(Examples(store, np.arange(len(rows)), Report()), False)


def planner(root, positions="labels") -> Planner:
    return Planner(PriorCache(root, IDENTITY), positions, CORE)


def store(root, plan) -> None:
    """What the plan asks for, as a scorer and a writer would."""
    with CacheWriter(root, IDENTITY, {}) as writer:
        for key, wanted, i in zip(plan.todo.keys, plan.todo.spans, plan.todo.index, strict=True):
            length = int(plan.examples.lengths[i])
            writer.add(bytes(key), length, wanted, fx.stats(spans.positions_of(wanted)))


def asked(plan) -> dict[tuple, list]:
    """ids -> runs to score."""
    rows = zip(plan.todo.index.tolist(), plan.todo.spans, strict=True)
    return {tuple(plan.examples[i].input_ids.tolist()): s.tolist() for i, s in rows}


def counts(plans: Planner) -> tuple:
    return plans.sequences, plans.scored, plans.scored_tokens, plans.statistics_tokens


def test_a_sequence_of_an_earlier_window_is_not_scored_again(tmp_path):
    plans = planner(tmp_path)
    first = plans.plan(window(([5, 6, 7, 8], "0111"), ([1, 2], "01"), ([1, 2], "01")))
    assert asked(first) == {(5, 6, 7, 8): [1, 4], (1, 2): [1, 2]}
    second = plans.plan(window(([1, 2], "01"), ([3, 4], "01"), ([5, 6, 7, 8], "0011")))
    assert asked(second) == {(3, 4): [1, 2]}
    assert second.todo.index.tolist() == [1]
    assert counts(plans) == (3, 3, 8, 5)
    assert asked(plans.plan(window(([3, 4], "01"), ([1, 2], "01")))) == {}
    assert counts(plans) == (3, 3, 8, 5)


def test_one_that_asks_for_more_is_scored_again_for_all(tmp_path):
    plans = planner(tmp_path)
    plans.plan(window(([5, 6, 7, 8], "0100"), ([1, 2], "01")))
    again = plans.plan(window(([5, 6, 7, 8], "0001")))
    assert asked(again) == {(5, 6, 7, 8): [1, 2, 3, 4]}
    assert counts(plans) == (2, 2, 10, 4)  # still two sequences
    assert asked(plans.plan(window(([5, 6, 7, 8], "0101")))) == {}
    assert asked(plans.plan(window(([5, 6, 7, 8], "0010")))) == {(5, 6, 7, 8): [1, 4]}


def test_what_the_cache_has_is_not_scored(tmp_path):
    store(tmp_path, planner(tmp_path).plan(window(([5, 6, 7, 8], "0110"), ([1, 2], "01"))))
    plans = planner(tmp_path)
    assert asked(plans.plan(window(([5, 6, 7, 8], "0010"), ([3, 4], "01")))) == {(3, 4): [1, 2]}
    assert counts(plans) == (2, 1, 2, 1)
    assert asked(plans.plan(window(([5, 6, 7, 8], "0111"), ([1, 2], "01")))) == {
        (5, 6, 7, 8): [1, 4]
    }
    assert counts(plans) == (3, 2, 6, 4)


def test_all_positions(tmp_path):
    plans = planner(tmp_path, "all")
    assert asked(plans.plan(window(([5, 6, 7, 8], "0100")))) == {(5, 6, 7, 8): [1, 4]}
    assert asked(plans.plan(window(([5, 6, 7, 8], "0001")))) == {}


def test_a_window_that_lacks_nothing_and_the_last_one(tmp_path):
    plans = planner(tmp_path)
    plans.plan(window(([1, 2], "01")))
    known = window(([1, 2], "01"))
    plan = plans.plan(Window(known.examples, True))
    assert plan.last and plan.examples is known.examples and len(plan.todo.keys) == 0


SEQUENCES = st.tuples(st.sampled_from([(1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (7, 8, 9, 1, 2)]),
                      st.integers(1, 15))  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    before=st.lists(SEQUENCES, max_size=4),
    windows=st.lists(st.lists(SEQUENCES, min_size=1, max_size=5), max_size=5),
)
def test_whatever_was_asked_for_is_then_in_one_row(tmp_path_factory, before, windows):
    """Read as training reads it, and by a run that has it all in one window, or other ones."""
    root = tmp_path_factory.mktemp("cache")

    def made(rows):
        return window(*((ids, f"0{bits:04b}") for ids, bits in rows))

    if before:
        store(root, planner(root).plan(made(before)))
    plans = planner(root)
    for rows in windows:
        store(root, plans.plan(made(rows)))
    every = [row for rows in windows for row in rows]
    assert plans.sequences == len({ids for ids, _ in every})
    assert plans.scored <= plans.sequences
    if every:
        wanted = request(made(every).examples)
        assert PriorCache(root, IDENTITY).missing(wanted.keys, wanted.spans, CORE) == []
        again = planner(root)
        for rows in windows:
            assert asked(again.plan(made(rows))) == {}


def test_many_keys(tmp_path):
    """Against a dictionary; keys that end in zero bytes among them."""
    generator = np.random.default_rng(0)
    plans, known = planner(tmp_path), {}
    for _ in range(12):
        ids = generator.integers(0, 40, (300, 2))
        plan = plans.plan(window(*((pair.tolist(), "01") for pair in ids)))
        fresh = {tuple(pair) for pair in ids.tolist()} - set(known)
        assert set(asked(plan)) == fresh
        known.update((pair, sequence_key(np.array(pair, np.int32))) for pair in fresh)
        assert plans.sequences == plans.scored == len(known)
    assert any(key.endswith(b"\0") for key in known.values())
