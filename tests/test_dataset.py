"""Examples as batches, padded or packed, with the prior's values at their tokens' places."""

import warnings

import numpy as np
import pytest
import torch

from prift.dataset import PriorDataset, collate
from prift.roles import RESPONSE
from tests.test_request import examples

ROWS = examples(([5, 6, 7, 8], "0101"), ([1, 2], "01"), ([9, 8, 7], "011"))
PRIOR = {
    "logprob": np.array([-0.5, -1.0, -1.5, -2.0, -2.5], np.float32),
    "rank": np.array([1, 2, 3, 4, 5], np.int32),
}


def test_items_carry_their_own_statistics():
    data = PriorDataset(ROWS, PRIOR)
    assert len(data) == 3
    items = [data[i] for i in range(3)]
    assert [item["input_ids"].tolist() for item in items] == [[5, 6, 7, 8], [1, 2], [9, 8, 7]]
    assert [item["places"].tolist() for item in items] == [[1, 3], [1], [1, 2]]
    assert [item["targets"].tolist() for item in items] == [[6, 8], [2], [8, 7]]
    assert [item["prior"]["rank"].tolist() for item in items] == [[1, 2], [3], [4, 5]]
    assert [(item["num_labels"], item["index"]) for item in items] == [(2, 0), (1, 1), (2, 2)]
    assert data.lengths.tolist() == [4, 2, 3]


def test_items_of_repeated_examples():
    repeated = examples(([5, 6, 7, 8], "0101"), ([1, 2], "01"), order=[1, 0, 1])
    data = PriorDataset(repeated, {"rank": np.array([3, 1, 2, 4], np.int32)})
    assert [data[i]["prior"]["rank"].tolist() for i in range(3)] == [[3], [1, 2], [4]]


def test_batches_are_padded_on_the_right():
    data = PriorDataset(ROWS, PRIOR)
    batch = collate([data[2], data[0], data[1]])
    expected = {
        "input_ids": [[9, 8, 7, 0], [5, 6, 7, 8], [1, 2, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]],
    }
    for name, values in expected.items():
        assert batch[name].tolist() == values
        assert batch[name].dtype == torch.int64
    assert batch["num_labels"] == 5 and batch["index"] == [2, 0, 1]
    others = {"tokens", "prior", "scale", "num_labels", "denominator", "index"}
    assert set(batch) == {*expected, *others}


LABELS = {"target": [8, 7, 6, 8, 2], "sequence": [0, 0, 1, 1, 2]}


@pytest.mark.parametrize("packed", [False, True])
def test_label_tokens_with_their_statistics(packed):
    """A token is predicted one place before its own."""
    data = PriorDataset(ROWS, PRIOR)
    batch = collate([data[2], data[0], data[1]], packed)
    places = [0, 1, 3, 5, 7] if packed else [0, 1, 4, 6, 8]
    tokens, prior = batch["tokens"], batch["prior"]
    role = tokens.pop("role")
    assert role.tolist() == [RESPONSE] * 5 and role.dtype == torch.uint8
    assert {name: values.tolist() for name, values in tokens.items()} == LABELS | {"place": places}
    assert {values.dtype for values in tokens.values()} == {torch.int64}
    assert prior["rank"].tolist() == [4, 5, 1, 2, 3]
    assert prior["logprob"].tolist() == [-2, -2.5, -0.5, -1, -1.5]
    assert prior["rank"].dtype == torch.int32
    assert prior["logprob"].dtype == torch.float32


def test_packed_batches_lie_end_to_end():
    data = PriorDataset(ROWS, PRIOR)
    batch = collate([data[2], data[0], data[1]], packed=True)
    assert batch["input_ids"].tolist() == [[9, 8, 7, 5, 6, 7, 8, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 9]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 7, 9] and batch["max_length_q"] == 4
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["num_labels"] == 5 and batch["index"] == [2, 0, 1]


def test_without_a_prior():
    data = PriorDataset(ROWS, {})
    assert data[0]["prior"] == {}
    assert collate([data[0], data[1]])["prior"] == {}


def test_batches_are_the_items_whatever_their_order():
    data = PriorDataset(ROWS, PRIOR)
    for order in ([0, 1, 2], [2, 1, 0], [1, 1], [0]):
        batch = collate([data[i] for i in order])
        for row, index in enumerate(order):
            item = data[index]
            size = len(item["input_ids"])
            assert batch["input_ids"][row, :size].tolist() == item["input_ids"].tolist()
            assert batch["attention_mask"][row].sum() == size
            own = batch["tokens"]["sequence"] == row
            width = batch["input_ids"].shape[1]
            places = batch["tokens"]["place"][own] - row * width
            assert (places + 1).tolist() == item["places"].tolist()
            for name, values in item["prior"].items():
                assert batch["prior"][name][own].tolist() == values.tolist()


def test_every_tensor_can_be_written_to():
    """Views of read-only or shared memory could not; a batch of one row was such a view."""
    data = PriorDataset(ROWS, PRIOR)
    for size, packed in [(1, False), (3, False), (1, True), (3, True)]:
        with warnings.catch_warnings(action="error"):
            batch = collate([data[i] for i in range(size)], packed)
        tensors = [value for value in batch.values() if torch.is_tensor(value)]
        for tensor in [*tensors, *batch["prior"].values(), *batch["tokens"].values()]:
            expected = tensor.clone()
            expected.view(-1)[0] = tensor.view(-1)[0] = 99
            assert torch.equal(tensor, expected)
