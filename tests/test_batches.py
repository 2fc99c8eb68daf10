"""Batches: what runs together, and what happens where memory does not suffice."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prift.backends.batches import Batches, Group
from prift.memory import is_out_of_memory


def alone(lengths: list[int]) -> list[Group]:
    return [Group([i], [n]) for i, n in enumerate(lengths)]


def drained(batches: Batches) -> list[list[Group]]:
    found = []
    while batches:
        found.append(batches.take())
    return found


def members(batches: list[list[Group]]) -> list[int]:
    return [i for batch in batches for group in batch for i in group.members]


def attended(batch: list[Group]) -> int:
    """Padded tokens that a batch's sequences attend to, prompts padded apart from the rest."""
    prompt = max(g.prompt for g in batch)
    rest = max(n - g.prompt for g in batch for n in g.lengths)
    return sum(len(g.members) for g in batch) * (prompt + rest)


@st.composite
def some_groups(draw) -> list[Group]:
    """Sequences alone and sequences with a prompt, in any order."""
    groups, count = [], 0
    for size in draw(st.lists(st.integers(1, 6), max_size=20)):
        prompt = draw(st.integers(1, 300)) if size > 1 else 0
        lengths = [
            prompt + n for n in draw(st.lists(st.integers(1, 200), min_size=size, max_size=size))
        ]
        groups.append(Group(list(range(count, count + len(lengths))), lengths, prompt))
        count += len(lengths)
    return draw(st.permutations(groups))


def test_a_group_counts_its_prompt_once_and_pads_its_answers():
    group = Group([4, 7, 9], [110, 130, 105], 100)
    assert (group.tokens, group.longest) == (100 + 3 * 30, 130)
    assert group.apart() == [Group([4], [110]), Group([7], [130]), Group([9], [105])]
    assert Group([3], [50]).tokens == 50


def test_longest_first_and_alike_together():
    batches = drained(Batches(alone([5, 100, 7, 7, 3, 50, 50]), 100))
    assert [[g.longest for g in b] for b in batches] == [[100], [50, 50], [7, 7, 5, 3]]


def test_what_is_longer_than_the_budget_runs_alone():
    batches = drained(Batches(alone([30, 5, 40, 5]), 10))
    assert [[g.longest for g in b] for b in batches] == [[40], [30], [5, 5]]


def test_lengths_on_both_sides_of_the_edge_are_never_mixed():
    batches = drained(Batches(alone([9, 10, 11, 12]), 1000, edge=10))
    assert [[g.longest for g in b] for b in batches] == [[12, 11], [10, 9]]


def test_many_answers_to_a_short_prompt_never_share_a_batch_with_a_long_prompt():
    """Each of the hundred would keep its own copy of the ten thousand tokens' padded keys."""
    long = Group([0, 1], [10_010] * 2, 10_000)
    short = Group(list(range(2, 102)), [120] * 100, 20)
    assert drained(Batches([short, long], 50_000)) == [[long], [short]]


@given(some_groups(), st.integers(1, 2000), st.sampled_from([0, 50, 150]))
def test_every_sequence_once_within_the_budget(groups, budget, edge):
    batches = drained(Batches(groups, budget, edge))
    assert sorted(members(batches)) == sorted(i for g in groups for i in g.members)
    assert all(len(batch) == 1 or attended(batch) <= budget for batch in batches)
    for batch in batches:
        assert len({bool(g.prompt) for g in batch}) == 1
        assert len({g.longest > edge for g in batch}) == 1
    order = [(bool(g.prompt), g.longest) for batch in batches for g in batch]
    assert order == sorted(order, reverse=True)  # prompts first, and of each kind longest first


def test_give_back_halves_and_takes_the_same_again():
    batches = Batches(alone([10] * 8 + [3]), 80)
    batch = batches.take()
    assert len(batch) == 8 and batches.give_back(batch) and batches.budget == 40
    assert batches.take() == batch[:4] and batches.take() == batch[4:]
    assert batches.take() == [Group([8], [3])]
    assert not batches


def test_give_back_halves_what_was_tried_and_not_what_was_allowed():
    batches = Batches(alone([10, 10]), 1_000_000)
    assert batches.give_back(batches.take()) and batches.budget == 10


def test_give_back_never_raises_the_budget():
    batches = Batches([Group([0, 1, 2], [900] * 3, 800)], 100)
    assert batches.give_back(batches.take()) and batches.budget == 100


def test_give_back_takes_a_group_apart_longest_first():
    group = Group([0, 1, 2], [40, 60, 50], 30)
    batches = Batches([group, Group([3, 4], [35, 35], 20)], 180)
    assert batches.take() == [group]
    assert batches.give_back([group])
    assert batches.budget == 90  # its prompt counts for each of its three
    assert batches.take() == [Group([1], [60])]
    assert batches.take() == [Group([2], [50])]
    assert batches.take() == [Group([0], [40])]
    assert batches.take() == [Group([3, 4], [35, 35], 20)]


def test_what_a_group_leaves_is_not_padded_to_longer_sequences():
    batches = Batches([Group(list(range(13)), [35] * 13, 20), *alone([100])], 455)
    assert batches.give_back(batches.take()) and batches.budget == 227
    found = drained(batches)
    halves = [Group(list(r), [35] * len(r), 20) for r in (range(6), range(6, 13))]
    assert found == [[halves[0]], [halves[1]], alone([100])]


def test_a_group_is_halved_down_to_its_sequences():
    group = Group(list(range(5)), [35, 40, 45, 50, 55], 20)
    two, three = group.halves()
    assert (two.members, two.lengths, two.prompt) == ([0, 1], [35, 40], 20)
    assert (three.members, three.lengths, three.prompt) == ([2, 3, 4], [45, 50, 55], 20)
    assert two.halves() == two.apart() and three.halves() == three.apart()


def test_one_sequence_cannot_be_cut():
    batches = Batches(alone([10]), 100)
    batch = batches.take()
    assert not batches.give_back(batch)
    assert not batches and batches.budget == 100


@given(some_groups(), st.integers(1, 2000), st.data())
def test_nothing_is_lost_whatever_does_not_fit(groups, budget, data):
    """Every failure of a batch that can be cut brings smaller ones: it ends."""
    batches, done, before = Batches(groups, budget), [], budget
    total = sum(len(g.members) for g in groups)
    for _ in range(20 * total + 20):
        if not batches:
            break
        batch = batches.take()
        fits = len(batch) == 1 and len(batch[0].members) == 1
        if fits or data.draw(st.booleans()):
            done.append(batch)
        else:
            assert batches.give_back(batch)
        assert 1 <= batches.budget <= before
        before = batches.budget
    assert not batches
    assert sorted(members(done)) == list(range(total))


@given(some_groups(), st.integers(1, 100_000), st.integers(1, 400))
def test_a_memory_of_any_size_is_found_out(groups, budget, memory):
    """Only what does not fit alone fails for good."""
    batches, done, failed = Batches(groups, budget), [], []
    while batches:
        batch = batches.take()
        if attended(batch) <= memory:
            done.append(batch)
        elif not batches.give_back(batch):
            failed.append(batch)
    lengths = {i: n for g in groups for i, n in zip(g.members, g.lengths, strict=True)}
    assert sorted(members(failed)) == sorted(i for i, n in lengths.items() if n > memory)
    assert sorted(members(done)) == sorted(i for i, n in lengths.items() if n <= memory)


def raised(work) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as error:
        work()
    return error.value


def test_failed_allocations_are_out_of_memory():
    assert is_out_of_memory(raised(lambda: torch.empty(2**60, dtype=torch.uint8)))
    assert is_out_of_memory(raised(lambda: bytearray(2**62)))


def test_other_errors_are_not():
    a = torch.zeros(2, 3)
    for error in (
        raised(lambda: a @ a),
        raised(lambda: a.view(5)),
        raised(lambda: torch.empty(2**62, 2**62)),  # no size at all
        raised(lambda: torch.zeros(3, requires_grad=True).numpy()),
    ):
        assert not is_out_of_memory(error), error
    assert not is_out_of_memory(ValueError("out of memory"))


SHORT_OF_MEMORY = """
import resource, sys, torch
from prift.memory import is_out_of_memory
a, b = torch.ones(4096, 64), torch.ones(64, 4096)
a @ b, (a * a).sum()  # what is set up once is set up now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
work = {
    "torch": lambda: a @ b,
    "concatenation": lambda: torch.cat([a] * 64),
    "numpy": lambda: __import__("numpy").ones(64 << 20),
    "python": lambda: [0] * (64 << 20),
}[sys.argv[1]]
try:
    work()
except BaseException as error:
    print(is_out_of_memory(error), type(error).__name__, error)
else:
    print("it fitted")
"""


@pytest.mark.parametrize("what", ["torch", "concatenation", "numpy", "python"])
def test_under_a_limit_of_the_system(what):
    command = [sys.executable, "-c", SHORT_OF_MEMORY, what]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout.startswith("True "), found
