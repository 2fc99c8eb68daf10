"""Sequences packed end to end, where torch's variable-length attention has a kernel.

Without CUDA its operator is given a kernel for the CPU here, by its own definition: everything of
prift's runs as it would there. On CUDA the tests run torch's own kernel.
"""

import functools

import numpy as np
import pytest
import torch

from prift.backends.batches import Group
from prift.backends.bodies import padded_rows
from prift.backends.packing import can_pack, packed_rows
from prift.backends.prompts import can_share
from prift.backends.ways import Ways
from prift.headcheck import head_or_reason
from prift.heads import body_of
from prift.precompute import _Lazy
from tests.families import tiny
from tests.scoring import sequences

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """The operator's definition for the CPU: softmax within each sequence, causal, windowed."""
    import torch.nn.attention.varlen as varlen

    if CUDA:
        yield
        return
    kernel = torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", _attend)
    assert varlen.varlen_attn
    yield kernel


def _attend(
    q,
    k,
    v,
    ends_q,
    ends_k,
    max_q,
    max_k,
    is_causal=False,
    scale=None,
    window=None,
    enable_gqa=False,
):
    assert q.shape[0] == k.shape[0] == int(ends_q[-1]) and torch.equal(ends_q, ends_k)
    lengths = ends_q.diff()
    assert int(lengths.max()) == max_q == max_k and ends_q.dtype == torch.int32
    assert enable_gqa or q.shape[1] == k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = torch.empty_like(q)
    for a, b in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        place = torch.arange(b - a)
        back = place[:, None] - place[None]
        seen = (back >= 0) if window[1] == 0 else torch.ones_like(back, dtype=torch.bool)
        seen &= (back <= window[0]) if window[0] >= 0 else True
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), k[a:b].double())
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", weights, v[a:b].double()).to(q.dtype)
    empty = torch.empty(0)
    return out, empty, torch.zeros(2, dtype=torch.uint64)


DTYPE = torch.bfloat16 if CUDA else torch.float32  # torch's kernel has no float32
PACKED = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "mixtral", "granite", "cohere"]


def given(family: str):
    model = tiny(family, DTYPE).to(DEVICE)
    head = head_or_reason(model)
    ids = sequences(301, [5, 40, 2, 33, 60, 17])
    positions = [np.arange(1, len(s)) for s in ids]
    positions[3] = np.array([4, 30])
    return model, body_of(model), head, ids, positions


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_are_those_of_each_sequence_alone(family):
    model, body, head, ids, positions = given(family)
    device = torch.device(DEVICE)
    with torch.inference_mode():
        packed = packed_rows(model, body, head, ids, positions, device)
        alone = torch.cat(
            [padded_rows(body, head, [s], [p], device) for s, p in zip(ids, positions, strict=True)]
        )
    loose = 1e-4 if DTYPE == torch.float32 else 0.05
    torch.testing.assert_close(packed, alone, rtol=loose, atol=loose * float(alone.abs().max()))
    assert model.config._attn_implementation == "sdpa"  # as it was


@pytest.mark.parametrize("family", PACKED)
def test_it_is_tried_and_then_used(family):
    model, body, head, ids, positions = given(family)
    said, tokens = [], []
    ways = Ways(model, head, said.append, may_pack=True)
    groups = ways.groups(ids, positions)
    assert groups == [Group([i], [len(s)]) for i, s in enumerate(ids)] and said == []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, args, out: tokens.append(args[0].shape))
    ways.rows(groups, ids, positions)
    hook.remove()
    assert tokens == [(1, sum(map(len, ids)))]  # no padding


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "no softcap"),
        ("gpt-oss", "no s_aux"),  # attention sinks
        ("mamba", "relative difference"),  # its state runs on through all sequences
        ("falcon-h1", "relative difference"),
    ],
)
def test_a_model_that_cannot_is_found_out(family, reason):
    model, body, head, ids, positions = given(family)
    said = []
    ways = Ways(model, head, said.append, may_pack=True)
    groups = ways.groups(ids, positions)
    (line,) = said
    assert line.startswith("sequences are padded, not packed: ") and reason in line
    rows = ways.rows(groups, ids, positions)
    device = torch.device(DEVICE)
    with torch.inference_mode():
        wanted = padded_rows(body, head, ids, positions, device)
    assert torch.equal(rows, wanted)


def test_a_model_that_counts_places_through_all_sequences_is_found_out():
    """A model with a fault: it does not hand on the places it is given."""
    model, body, head, _, _ = given("gpt2")
    ids = sequences(301, [5, 20, 2, 10])
    positions = [np.arange(1, len(s)) for s in ids]
    forward = body.forward

    @functools.wraps(forward)
    def blind(*args, position_ids=None, **options):
        return forward(*args, **options)

    body.forward, said = blind, []
    Ways(model, head, said.append, may_pack=True).groups(ids, positions)
    assert len(said) == 1 and "relative difference" in said[0]


def test_sequences_that_are_made_when_asked_for():
    """As precompute hands them on: they can be indexed, and that is all."""
    model, _, head, ids, positions = given("llama")
    lazy = _Lazy(len(ids), lambda i: ids[i]), _Lazy(len(ids), lambda i: positions[i])
    said = []
    groups = Ways(model, head, said.append, may_pack=True).groups(*lazy)
    assert len(groups) == len(ids) and said == []


def test_layers_with_windows_are_padded():
    """Some models tell a window by the mask alone, and four short sequences would not show it."""
    assert not can_share(tiny("mistral")) and can_share(tiny("llama"))


def test_only_where_there_is_a_kernel_for_it():
    model = tiny("llama", torch.bfloat16)
    assert can_pack(model) is False  # on a CPU
    if CUDA:
        assert can_pack(model.to("cuda")) and not can_pack(model.float())
