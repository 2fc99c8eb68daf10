"""What names a prior: digests of weights and config, and the memory of file hashes."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    Gemma2Config,
    LlamaConfig,
    Qwen2Config,
)

from prift.errors import CacheError
from prift.home import cache_home
from prift.identity import (
    PriorIdentity,
    canonical_json,
    config_digest,
    file_digest,
    quantization_of,
    weights_digest,
)
from tests.cache_fixtures import IDENTITY

ALPHA = "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8"
BETA = "f44e64e75f3948e9f73f8dfa94721c4ce8cbb4f265c4790c702b2d41cfbf2753"


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """The file of remembered hashes, in a home of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "prift" / "file-hashes.json"


def settled(path: Path, data: bytes, age: float = 1000.0) -> Path:
    """A file that was written a while ago."""
    path.write_bytes(data)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def test_canonical_json():
    value = {"b": [1, None, True], "a": {"z": "\u00e9", "y": 0.5}}
    assert canonical_json(value) == '{"a":{"y":0.5,"z":"\\u00e9"},"b":[1,null,true]}'


def test_id_is_the_hash_of_the_canonical_json():
    text = IDENTITY.json()
    assert list(json.loads(text)) == sorted(PriorIdentity.__dataclass_fields__)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == IDENTITY.id == "5c958f5a57af1fb9"
    assert PriorIdentity.parse(text, "here") == IDENTITY


@pytest.mark.parametrize("field", PriorIdentity.__dataclass_fields__)
def test_every_field_changes_the_id(field):
    other = replace(IDENTITY, **{field: 2 if field == "stats_version" else "other"})
    assert other.id != IDENTITY.id
    assert other.differences(IDENTITY) == {field: (getattr(other, field), getattr(IDENTITY, field))}


def test_equal_identities_differ_in_nothing():
    assert IDENTITY.differences(replace(IDENTITY)) == {}


@pytest.mark.parametrize("text", ["", "no", "{}", "[1]", '{"more": 1}'])
def test_text_that_is_no_identity_names_its_place(text):
    with pytest.raises(CacheError, match="/x/prior.json is not a prior's identity"):
        PriorIdentity.parse(text, "/x/prior.json")


def test_weights_digest_by_hand(tmp_path):
    a = settled(tmp_path / "a.safetensors", b"alpha")
    b = settled(tmp_path / "b.safetensors", b"beta")
    # printf 'a.safetensors <sha256 of alpha>\nb.safetensors <sha256 of beta>' | sha256sum
    expected = "ebf7b11a48c2ebb01079b5bba69b3d1cc9092be29ca33593043e12b00b1c630e"
    assert weights_digest([a, b]) == weights_digest([b, a]) == expected
    (tmp_path / "sub").mkdir()
    moved = settled(tmp_path / "sub" / "a.safetensors", b"alpha")
    assert weights_digest([moved, b]) == expected  # folders have no say
    renamed = settled(tmp_path / "c.safetensors", b"alpha")
    assert weights_digest([renamed, b]) != expected


def small(cls=Qwen2Config, **changes):
    return cls(**{"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99, **changes})


def test_config_digest_ignores_where_a_config_came_from_and_how_it_is_run(tmp_path):
    expected = config_digest(small())
    small(dtype="bfloat16", use_cache=False).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.name_or_path == str(tmp_path)
    assert config_digest(loaded) == expected
    for name, value in {
        "_name_or_path": "me/mine",
        "_commit_hash": "0123",
        "dtype": "float16",
        "use_cache": False,
        "cache_implementation": "static",
        "_attn_implementation": "sdpa",
    }.items():
        changed = small()
        setattr(changed, name, value)
        assert config_digest(changed) == expected, name


def test_config_digest_ignores_the_version_of_transformers(monkeypatch):
    expected = config_digest(small())
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    assert small().to_dict()["transformers_version"] == "99.0"
    assert config_digest(small()) == expected


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (Qwen2Config, {"vocab_size": 100}),
        (Qwen2Config, {"rms_norm_eps": 1e-5}),
        (Qwen2Config, {"tie_word_embeddings": True}),
        (Qwen2Config, {"hidden_act": "gelu"}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8}),
        (Qwen2Config, {"layer_types": ["sliding_attention", "full_attention"]}),
        (Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        ),
        (LlamaConfig, {"max_position_embeddings": 99}),
        (Gemma2Config, {"final_logit_softcapping": None}),
        (Gemma2Config, {"attn_logit_softcapping": 20.0}),
        (Gemma2Config, {"query_pre_attn_scalar": 64}),
    ],
)
def test_config_digest_sees_what_changes_the_numbers(cls, changes):
    assert config_digest(small(cls, **changes)) != config_digest(small(cls))


def test_config_digest_ignores_no_field_but_the_named_ones():
    fields, expected = small().to_dict(), config_digest(small())
    ignored, seen = set(), set()
    for name in fields:
        changed = small()
        changed.__dict__[name] = "another"
        if changed.to_dict() != fields:  # some are properties: what they read is another field
            (ignored if config_digest(changed) == expected else seen).add(name)
    assert ignored == {"dtype", "use_cache", "_name_or_path"}
    assert {"vocab_size", "rope_parameters", "sliding_window", "architectures"} <= seen


def test_quantization_is_canonical_json_or_none():
    config = small()
    assert quantization_of(config) is None
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert quantization_of(config) == '{"bits":4,"quant_method":"gptq"}'
    config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    assert '"load_in_8bit":true' in quantization_of(config)


def test_cache_home(tmp_path, monkeypatch):
    assert cache_home() == tmp_path / "home" / "prift"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/someone")
    assert cache_home() == Path("/someone/.cache/prift")


def test_a_hash_is_remembered_by_size_time_and_inode(tmp_path, memory):
    file = settled(tmp_path / "w", b"alpha")
    assert file_digest(file) == ALPHA
    status = file.stat()
    assert json.loads(memory.read_text()) == {
        str(file): [status.st_size, status.st_mtime_ns, status.st_ino, ALPHA]
    }
    # Proof that the file is not read again: the memory is believed.
    memory.write_text(memory.read_text().replace(ALPHA, BETA))
    assert file_digest(file) == BETA


def test_a_changed_file_is_hashed_again(tmp_path):
    file = settled(tmp_path / "w", b"alpha")
    assert file_digest(file) == ALPHA
    settled(file, b"beta")
    assert file_digest(file) == BETA  # another size
    settled(file, b"alph", age=500)
    assert file_digest(file) == hashlib.sha256(b"alph").hexdigest()  # another time
    then = file.stat().st_mtime_ns
    other = tmp_path / "other"
    other.write_bytes(b"beta")
    os.utime(other, ns=(then, then))
    os.replace(other, file)
    assert file_digest(file) == BETA  # another inode


def test_a_file_written_just_now_is_not_remembered(tmp_path, memory):
    """It may change again within the resolution of its time stamp."""
    file = tmp_path / "w"
    file.write_bytes(b"alpha")
    assert file_digest(file) == ALPHA
    assert not memory.exists()


def test_a_link_is_remembered_by_the_file_it_leads_to(tmp_path, memory):
    file = settled(tmp_path / "w", b"alpha")
    link = tmp_path / "link"
    link.symlink_to(file)
    assert file_digest(link) == ALPHA
    assert list(json.loads(memory.read_text())) == [str(file)]


@pytest.mark.parametrize("garbage", ["", "{", "[]", "3", "null", "\x00\xff", '{"x": 1}'])
def test_garbage_in_the_memory_is_replaced(tmp_path, memory, garbage):
    file = settled(tmp_path / "w", b"alpha")
    memory.parent.mkdir(parents=True)
    memory.write_bytes(garbage.encode("latin-1"))
    assert file_digest(file) == ALPHA
    assert json.loads(memory.read_text())[str(file)][3] == ALPHA


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_an_entry_of_another_shape_is_not_believed(tmp_path, memory, cut):
    file = settled(tmp_path / "w", b"alpha")
    status = file.stat()
    entry = [status.st_size, status.st_mtime_ns, status.st_ino, 7]
    memory.parent.mkdir(parents=True)
    memory.write_text(json.dumps({str(file): entry[:cut] if cut else entry, "/other": "kept"}))
    assert file_digest(file) == ALPHA
    assert json.loads(memory.read_text())["/other"] == "kept"


@pytest.mark.parametrize("blocked", ["home", "home/prift", "home/prift/file-hashes.json/x"])
def test_a_memory_that_cannot_be_written_is_no_error(tmp_path, blocked):
    place = tmp_path / blocked
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    file = settled(tmp_path / "w", b"alpha")
    assert file_digest(file) == ALPHA
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted([place.name, "w"])


def test_a_newer_prifts_identity_keeps_its_id_and_is_refused():
    text = canonical_json(json.loads(IDENTITY.json()) | {"sampling": [1], "stats_version": 1})
    found = PriorIdentity.parse(text, "here")
    assert found.id == hashlib.sha256(text.encode()).hexdigest()[:16] != IDENTITY.id
    assert found.differences(IDENTITY) == {"sampling": ([1], None)}
    assert IDENTITY.differences(found) == {"sampling": (None, [1])}
    assert IDENTITY.refusal(["logprob"]) is None
    with pytest.raises(CacheError, match=f"prior {found.id} cannot be read: .* 'sampling'"):
        found.check()


@pytest.mark.parametrize(
    ("field", "value"), [("weights", 3), ("stats_version", "1"), ("stats_version", True)]
)
def test_a_field_of_another_type_is_no_identity(field, value):
    text = canonical_json(json.loads(IDENTITY.json()) | {field: value})
    with pytest.raises(CacheError, match=f"{field} is '"):
        PriorIdentity.parse(text, "here")
