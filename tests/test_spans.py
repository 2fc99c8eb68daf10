"""Runs of scored positions, against sets of positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prift.store import spans
from tests.cache_fixtures import runs

MASKS = st.lists(st.booleans(), max_size=12).map(lambda tail: np.array([False, *tail]))


def test_runs_of_a_mask():
    assert spans.spans_of(np.array([0, 1, 1, 0, 1], bool)).tolist() == [1, 3, 4, 5]
    assert spans.spans_of(np.zeros(4, bool)).tolist() == []
    assert spans.spans_of(np.array([0, 1], bool)).dtype == np.int32


def test_positions_and_count_of_runs():
    assert spans.positions_of(runs(1, 3, 4, 5)).tolist() == [1, 2, 4]
    assert spans.positions_of(runs()).tolist() == []
    assert spans.count(runs(1, 3, 4, 5)) == 3
    assert spans.count(runs()) == 0


@given(mask=MASKS)
def test_runs_hold_exactly_the_positions_of_the_mask(mask):
    found = spans.spans_of(mask)
    assert spans.valid(found, len(mask))
    assert spans.positions_of(found).tolist() == np.flatnonzero(mask).tolist()
    assert spans.count(found) == mask.sum()


@given(a=MASKS, b=MASKS)
def test_the_union_holds_the_positions_of_both(a, b):
    both = spans.union(spans.spans_of(a), spans.spans_of(b))
    assert both.dtype == np.int32 and spans.valid(both, max(len(a), len(b)))
    assert set(spans.positions_of(both)) == {*np.flatnonzero(a), *np.flatnonzero(b)}


def test_rows_of_runs_in_one_array():
    flat, counts = spans.flat([runs(1, 3), runs(), runs(2, 3, 5, 9)])
    assert (flat.tolist(), counts.tolist()) == ([1, 3, 2, 3, 5, 9], [2, 0, 4])
    assert [x.dtype for x in (flat, counts)] == [np.int32, np.int64]
    assert [len(x) for x in spans.flat([])] == [0, 0]


def all_valid(*edges):
    return spans.all_valid(runs(*edges), np.array([len(edges)]), np.array([5]))


@pytest.mark.parametrize("edges", [(), (1, 2), (1, 5), (1, 2, 3, 5), (4, 5)])
def test_valid(edges):
    assert spans.valid(runs(*edges), 5) and all_valid(*edges)


@pytest.mark.parametrize(
    "edges",
    [
        (0, 2),  # position 0 follows nothing
        (-1, 2),
        (1,),  # a run without an end
        (1, 2, 3),
        (2, 2),  # empty
        (3, 2),  # backwards
        (1, 6),  # beyond 5 tokens
        (1, 2, 2, 4),  # touching
        (3, 4, 1, 2),  # unsorted
        (1, 3, 2, 4),  # overlapping
        (1, 2147483647, -2147483648, -1, 4, 5),  # every int32 difference is positive
    ],
)
def test_not_valid(edges):
    assert not spans.valid(runs(*edges), 5) and not all_valid(*edges)


def test_all_valid_looks_at_every_row():
    good, bad = [runs(1, 2), runs(), runs(2, 3, 4, 5)], runs(0, 2)
    for at in range(4):
        rows = [*good[:at], bad, *good[at:]]
        counts = np.array([len(r) for r in rows])
        assert not spans.all_valid(np.concatenate(rows), counts, np.full(4, 5))
    counts = np.array([2, 0, 4])
    assert spans.all_valid(np.concatenate(good), counts, np.array([2, 0, 5]))
    assert not spans.all_valid(np.concatenate(good), counts, np.array([2, 0, 4]))


def test_an_odd_row_is_not_mended_by_another_odd_row():
    assert not spans.all_valid(runs(1, 2, 3, 4), np.array([1, 3]), np.array([9, 9]))


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(-1, 7), max_size=5), st.integers(0, 7)), max_size=5
    )
)
def test_all_valid_is_valid_of_each(rows):
    def naive(edges, length):
        if len(edges) % 2:
            return False
        growing = all(a < b for a, b in zip(edges, edges[1:], strict=False))
        return not edges or (growing and edges[0] >= 1 and edges[-1] <= length)

    flat = np.array([e for edges, _ in rows for e in edges], np.int32)
    counts = np.array([len(edges) for edges, _ in rows], np.int64)
    lengths = np.array([length for _, length in rows], np.int32)
    assert spans.all_valid(flat, counts, lengths) == all(naive(*row) for row in rows)


def test_cover_says_where_a_wanted_run_lies():
    stored, wanted = runs(1, 4, 6, 9), runs(2, 3, 6, 8)
    covered, offsets = spans.cover(stored, np.array([4]), wanted, np.array([4]))
    assert covered.tolist() == [True]
    assert offsets.tolist() == [1, 3]  # stored positions: 1 2 3 6 7 8


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(MASKS, MASKS), max_size=6))
def test_cover_is_the_subset_relation_and_finds_each_position(pairs):
    stored = [spans.spans_of(a) for a, _ in pairs]
    wanted = [spans.spans_of(b) for _, b in pairs]
    flat = [np.concatenate([runs(), *rows]) for rows in (stored, wanted)]
    counts = [np.array([len(r) for r in rows], np.int64) for rows in (stored, wanted)]
    covered, offsets = spans.cover(flat[0], counts[0], flat[1], counts[1])
    at = 0
    for row, (have, want) in enumerate(zip(stored, wanted, strict=True)):
        places = spans.positions_of(have).tolist()
        assert covered[row] == set(spans.positions_of(want)).issubset(places)
        for begin in want[::2]:
            if covered[row]:
                assert places[offsets[at]] == begin
            at += 1


def test_joined_stretches():
    assert spans.joined(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert spans.joined(np.array([], np.int64), np.array([], np.int64)).tolist() == []
