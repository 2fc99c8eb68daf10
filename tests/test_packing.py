"""Sequences packed end to end, where torch's variable-length attention has a kernel.

Without CUDA its operator is given a kernel for the CPU here (tests/varlen.py): everything of
prift's runs as it would there. On CUDA the tests run torch's own kernel.
"""

import copy
import functools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from prift import packcheck
from prift.backends.batches import Group
from prift.backends.bodies import padded_rows
from prift.backends.packing import can_pack, packed_rows
from prift.backends.prompts import can_share
from prift.backends.ways import Ways
from prift.headcheck import head_or_reason
from prift.heads import body_of
from prift.packcheck import packing_misfit
from prift.packing import NAME, kernel_refusal, varlen_attention
from prift.scoring import _Lazy
from tests.families import tiny
from tests.scoring import sequences
from tests.varlen import on_the_cpu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(scope="module", autouse=True)
def kernel():
    with nullcontext() if CUDA else on_the_cpu():
        yield


DTYPE = torch.bfloat16 if CUDA else torch.float32  # torch's kernel has no float32
PACKED = [
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "smollm3", "starcoder2", "olmo2", "phi3",
    "phi", "gpt-neox", "gpt2", "opt", "gemma3", "cohere", "cohere2", "granite", "mixtral",
    "qwen3-moe", "olmoe",
]  # fmt: skip


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
        packed = packed_rows(model, head, ids, positions, device)
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
        ("gemma2", "no soft caps"),
        ("gpt-oss", "no sinks"),
        ("nemotron", "do not hand on where sequences end"),
        ("mamba2", "0 of its 2 layers attend"),
        ("jamba", "1 of its 2 layers attend"),
        ("falcon-h1", "relative difference"),  # its state runs on through all sequences
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
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(20)  # places tell, in half precision too
    ids = sequences(301, [5, 20, 2, 10])
    positions = [np.arange(1, len(s)) for s in ids]
    forward = body.forward

    @functools.wraps(forward)
    def blind(*args, position_ids=None, **options):
        return forward(*args, **options)

    body.forward, said = blind, []
    Ways(model, head, said.append, may_pack=True).groups(ids, positions)
    assert len(said) == 1 and "relative difference" in said[0]


def test_a_faint_view_of_other_sequences_is_found_out(monkeypatch):
    """Fainter than what rounding explains of the comparison with sequences alone."""
    model, body, head, ids, _ = given("llama")
    forward, share = body.forward, 0.02

    @functools.wraps(forward)
    def leaking(*args, **options):
        answer = forward(*args, **options)
        hidden = answer.last_hidden_state
        if hidden.shape[0] == 1 and hidden.shape[1] == sum(map(len, ids)):
            answer.last_hidden_state = hidden + share * hidden.mean(1, keepdim=True)
        return answer

    monkeypatch.setattr(packcheck, "difference", lambda *_: None)  # as if it explained all
    assert packing_misfit(model, head, ids) is None
    body.forward = leaking
    assert "sequences see each other, relative difference" in packing_misfit(model, head, ids)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_an_attention_that_wants_as_many_keys_as_queries(family, monkeypatch):
    """Torch 2.11's has no enable_gqa."""
    from torch.nn.attention import varlen

    model, _, head, ids, _ = given(family)
    heads, newer = model.config.num_attention_heads, varlen.varlen_attn
    assert heads > model.config.num_key_value_heads

    def older(query, key, value, ends, ends_k, longest, longest_k, *, scale, window_size):
        assert query.shape[1] == key.shape[1] == value.shape[1] == heads
        options = {"scale": scale, "window_size": window_size}
        return newer(query, key, value, ends, ends_k, longest, longest_k, **options)

    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert packing_misfit(model, head, ids, training=True) is None


def test_sequences_that_are_made_when_asked_for():
    """As precompute hands them on: they can be indexed, and that is all."""
    model, _, head, ids, positions = given("llama")
    lazy = _Lazy(len(ids), lambda i: ids[i]), _Lazy(len(ids), lambda i: positions[i])
    said = []
    groups = Ways(model, head, said.append, may_pack=True).groups(*lazy)
    assert len(groups) == len(ids) and said == []


def test_windows_that_the_mask_alone_tells_are_found_out():
    """Four short sequences would not show them."""
    model, _, head, _, _ = given("mistral")
    config = copy.copy(model.config)
    config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.config = config
    ids = sequences(301, [5, 7, 2, 10])
    said = []
    Ways(model, head, said.append, may_pack=True).groups(ids, [np.arange(1, len(s)) for s in ids])
    assert len(said) == 1 and "windows by the mask alone" in said[0]


def test_windows_are_packed_but_keep_no_prompts():
    assert not can_share(tiny("mistral")) and can_share(tiny("llama"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_that_may_pack_answers_as_it_always_did(side):
    """Padded batches with their mask, and generation from them."""
    model, *_ = given("mistral")
    ids = torch.randint(3, 301, (2, 30), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, slice(12) if side == "left" else slice(18, None)] = 0

    def answers() -> list[torch.Tensor]:
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=mask).logits
            plain = model(input_ids=ids).logits
        settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
        return [whole[mask == 1], plain, model.generate(ids, **settings)]

    expected = answers()
    with varlen_attention(model):
        assert model.config._attn_implementation == NAME
        found = answers()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert model.config._attn_implementation == "sdpa"


def test_only_where_there_is_a_kernel_for_it():
    device = torch.device(DEVICE)
    assert can_pack(tiny("llama", torch.bfloat16)) is False  # on a CPU nobody asked for it
    assert kernel_refusal(device, DTYPE) is None
    if CUDA:
        model = tiny("llama", torch.bfloat16).to(DEVICE)
        assert can_pack(model) and not can_pack(model.float())
