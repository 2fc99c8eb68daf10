"""Where a model goes, and that a model which accelerate dispatched is scored all the same."""

import re

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from prift.errors import ModelError
from prift.headcheck import check_causal, head_or_reason
from prift.heads import Head, body_of, run_body
from prift.models import attention_for, load_config, load_model
from prift.placement import WORKING_BYTES, Placement, choose, place, weight_bytes
from tests.families import save, tiny

GIB = 1 << 30
ROOM = WORKING_BYTES


def test_without_cuda_devices_it_is_the_cpu():
    assert choose(500 * GIB, {}) == Placement(None, None)


def test_one_device_where_the_weights_and_the_room_to_work_fit():
    assert choose(10 * GIB, {0: 10 * GIB + ROOM}) == Placement({"": "cuda:0"})
    with pytest.raises(ModelError):
        choose(10 * GIB + 1, {0: 10 * GIB + ROOM})


def test_the_first_device_that_fits():
    free = {0: 3 * GIB, 1: 20 * GIB, 2: 80 * GIB}
    assert choose(10 * GIB, free) == Placement({"": "cuda:1"})


def test_spread_over_all_devices_and_nothing_else():
    free = {0: 10 * GIB, 1: ROOM // 2, 3: 12 * GIB}
    room = {0: 10 * GIB - ROOM, 3: 12 * GIB - ROOM}
    assert choose(sum(room.values()), free) == Placement("auto", room)
    with pytest.raises(ModelError):
        choose(sum(room.values()) + 1, free)


def test_too_large_says_what_is_needed_and_free():
    with pytest.raises(ModelError) as error:
        choose(int(131.4 * GIB), {0: 79 * GIB, 1: int(40.25 * GIB)}, "prior in bfloat16")
    message = str(error.value)
    assert "prior in bfloat16 needs 131.4 GiB" in message
    assert "free: 79.0, 40.2 GiB on 2 GPU(s)" in message
    assert re.findall(r"--[\w-]+", message) == ["--backend", "--tensor-parallel-size"]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_are_those_of_the_loaded_model(tmp_path, stored, dtype, width):
    for family in ("llama", "llama-tied"):
        model = tiny(family, stored)
        model.save_pretrained(tmp_path / family)
        numbers = sum(p.numel() for p in model.parameters())  # a tied tensor once
        assert weight_bytes(tmp_path / family, dtype) == numbers * width


def test_bytes_of_all_shards_and_of_packed_tensors(tmp_path):
    from safetensors.torch import save_file

    model = tiny("llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    numbers = sum(p.numel() for p in model.parameters())
    assert weight_bytes(tmp_path / "shards", "bfloat16") == 2 * numbers
    save_file(
        {"blocks": torch.zeros(7, 3, dtype=torch.uint8), "scale": torch.zeros(5)},
        tmp_path / "model.safetensors",
    )
    assert weight_bytes(tmp_path, "bfloat16") == 7 * 3 + 5 * 2


def test_a_damaged_header_is_named(tmp_path):
    save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot read model.safetensors"):
        weight_bytes(tmp_path, "float32")


def test_place_asks_the_machine(tmp_path):
    save("llama", tmp_path)
    assert place(tmp_path, "float32", "cpu") == Placement()
    found = place(tmp_path, "float32")
    assert (found == Placement()) == (not torch.cuda.is_available())


def load(folder, **options):
    config = load_config(folder)
    attention = attention_for(config)
    return load_model(folder, config, dtype="float32", attention=attention, **options)


def test_load_model_goes_where_it_is_told(tmp_path):
    save("llama", tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain = load(tmp_path)(input_ids=ids).logits
        placed = load(tmp_path, device_map={"": "cpu"})(input_ids=ids).logits
    assert torch.equal(plain, placed)
    meta = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ModelError, match="1 tensors are left over, lm_head.weight among them"):
        load(tmp_path, device_map=meta)


@pytest.mark.parametrize("family", ["llama", "cohere", "mamba", "gemma2", "opt"])
def test_accelerates_hooks_change_nothing(family):
    """A spread model has hooks around every forward; its signatures must still be read."""
    plain = tiny(family)
    spread = dispatch_model(tiny(family), {"": "cpu"}, force_hooks=True)
    assert hasattr(spread, "_hf_hook") and hasattr(spread.get_input_embeddings(), "_hf_hook")
    check_causal(spread)
    ids = torch.tensor(np.arange(30)[None] * 7 % 301)
    logits = []
    for model in (plain, spread):
        head = head_or_reason(model)
        assert isinstance(head, Head), head
        with torch.no_grad():
            logits.append(head.logits(run_body(body_of(model), ids, head)[0]))
    assert torch.equal(*logits)
