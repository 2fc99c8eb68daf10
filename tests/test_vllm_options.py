"""What is refused before vLLM is started, what its engine is told, and the prior's identity."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prift.backends import vllm, vllm_engine, vllm_options
from prift.backends.vllm_engine import own_gpu, parse_version
from prift.backends.vllm_log import cause
from prift.backends.vllm_options import VLLMOptions, engine_settings, identify
from prift.engines import PrecomputeOptions, check_options, statistics_of
from prift.errors import ModelError, OptionError
from prift.models import load_config
from prift.stats import CORE
from tests import cli_fixtures as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cli.make_model(tmp_path_factory.mktemp("model") / "m")


def identity_of(folder, dtype="auto", logits_dtype="float32", **options):
    config = load_config(Path(folder))
    return identify(
        Path(folder), config, VLLMOptions(**options), dtype=dtype, logits_dtype=logits_dtype
    )


def settings_of(folder, longest=None, dtype="float32", logits_dtype="float32", **options):
    config, path = load_config(Path(folder)), Path(folder)
    identity = identity_of(folder, dtype, logits_dtype, **options)
    return engine_settings(path, config, identity, VLLMOptions(**options), longest, False)


@pytest.mark.parametrize("text, found", [("0.28.0", (0, 28)), ("0.33.1+cu130", (0, 33))])
def test_versions(text, found):
    assert parse_version(text) == found
    assert vllm_engine.SUPPORTED[0] <= found < vllm_engine.SUPPORTED[1]


@pytest.mark.parametrize("text", ["0.13.2", "0.8.5.post1", "unknown"])
def test_a_version_too_old_is_refused(text):
    with pytest.raises(OptionError, match=rf"vLLM {text} is too old.*pip install 'prift\[vllm\]'"):
        parse_version(text)


def test_without_vllm_the_error_has_the_command(tmp_path):
    data = cli.write_rows(tmp_path / "rows.jsonl")
    model = cli.make_model(tmp_path / "m")
    result = cli.precompute(model, data, tmp_path / "cache", "--backend", "vllm")
    assert result.exit_code == 1
    assert "pip install 'prift[vllm]'" in result.output


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is for --backend vllm"),
        ({"vllm_mode": "bounds"}, "--vllm-mode is for --backend vllm"),
        ({"engine_args": {"a": 1}}, "--engine-arg is for --backend vllm"),
        (
            {"backend": "vllm", "batch_tokens": 9},
            "--batch-tokens is for --backend hf; for vLLM it is --max-num-batched-tokens",
        ),
        ({"backend": "vllm", "attention": "eager"}, "--attention is for --backend hf"),
        ({"backend": "vllm", "engine": "ray"}, "--engine ray runs --backend hf alone"),
        (
            {"backend": "vllm", "vllm_mode": "bounds", "statistics": "extended"},
            "--vllm-mode bounds has no --statistics extended",
        ),
    ],
)
def test_options_of_the_other_backend_are_refused_by_name(options, message):
    with pytest.raises(OptionError, match=message):
        check_options(PrecomputeOptions(**options))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("dtype", "half", "use --dtype"),
        ("tensor_parallel_size", 2, "use --tensor-parallel-size"),
        ("worker_extension_cls", "x.Y", "is set by prift itself$"),
        ("hf-overrides", {}, "is set by prift itself$"),
        ("max-model-len", 9, "vLLM calls it max_model_len"),
        ("load_format", "dummy", "is set by prift itself$"),
        ("config_format", "mistral", "is set by prift itself$"),
        ("model_weights", "s3://other", "is set by prift itself$"),
        ("distributed_executor_backend", "ray", "would not end with prift.*--shard i/n"),
        ("max_logprobs", 5, "max_logprobs=5: statistics take 6 or more"),
        ("max_logprobs", "many", "max_logprobs=many"),
    ],
)
def test_engine_arguments_that_are_prifts_are_refused(name, value, message):
    with pytest.raises(OptionError, match=message):
        VLLMOptions(engine_args={name: value}).check()


def test_an_empty_quantization_is_refused():
    with pytest.raises(OptionError, match="--quantization is empty"):
        VLLMOptions(quantization=" ").check()
    VLLMOptions(quantization="fp8", engine_args={"max_logprobs": -1}).check()


def test_bounds_store_no_entropy():
    options = PrecomputeOptions(backend="vllm", vllm_mode="bounds")
    assert set(CORE) - set(statistics_of(options)) == {"entropy"}
    assert statistics_of(replace(options, vllm_mode="auto")) == CORE


def test_the_engine_is_told_of_the_longest_sequence_and_one_more(folder):
    assert settings_of(folder)["max_model_len"] == cli.CONTEXT + 1
    assert settings_of(folder, longest=20)["max_model_len"] == 21
    assert settings_of(folder, longest=10**6)["max_model_len"] == cli.CONTEXT + 1
    assert settings_of(folder, engine_args={"max_model_len": 9})["max_model_len"] == 9


def test_the_head_is_float32_unless_its_rounding_is_asked_for(folder):
    head = {"head_dtype": "float32"}
    assert "hf_overrides" not in settings_of(folder)
    assert settings_of(folder, dtype="bfloat16")["hf_overrides"] == head
    assert "hf_overrides" not in settings_of(folder, dtype="bfloat16", logits_dtype="bfloat16")
    # rounded once, in the worker, and not to half precision before
    assert settings_of(folder, dtype="float16", logits_dtype="bfloat16")["hf_overrides"] == head


def test_what_changes_the_numbers_is_in_the_identity_and_nothing_else_is(folder):
    plain = identity_of(folder)
    assert (plain.backend, plain.attention, plain.quantization) == ("vllm", "vllm", None)
    assert plain.dtype == plain.logits_dtype == "float32"
    same = {"tensor_parallel_size": 2, "max_num_batched_tokens": 64, "mode": "bounds"}
    assert identity_of(folder, **same, engine_args=dict.fromkeys(NO_NUMBERS, 30)) == plain
    quantised = identity_of(folder, quantization="fp8", engine_args={"kv_cache_dtype": "fp8"})
    assert json.loads(quantised.quantization) == {
        "checkpoint": None,
        "vllm": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    }
    assert identity_of(folder, engine_args={"attention_backend": "FLASHINFER"}).differences(
        plain
    ) == {"attention": ("flashinfer", "vllm")}
    assert identity_of(folder, dtype="bfloat16").id != plain.id


NO_NUMBERS = ["max_model_len", "max_logprobs", "enforce_eager", "enable_prefix_caching", "seed"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_cache_dtype", "fp8"),
        ("model_impl", "transformers"),
        ("mamba_ssm_cache_dtype", "float32"),
        ("compilation_config", {"mode": 3}),
        ("attention_config", {"flash_attn_version": 2}),
        ("not_yet_known", True),
    ],
)
def test_an_argument_that_is_not_known_to_leave_the_numbers_is_in_the_identity(folder, name, value):
    asked = identity_of(folder, engine_args={name: value})
    assert json.loads(asked.quantization) == {"checkpoint": None, "vllm": {name: value}}
    assert asked.attention == "vllm"
    for default in ("auto", None):
        assert identity_of(folder, engine_args={name: default}) == identity_of(folder)


def test_the_attention_is_in_the_identity_once(folder):
    both = {"backend": "FLASHINFER", "flash_attn_version": 2}
    asked = identity_of(folder, engine_args={"attention_config": both})
    assert asked.attention == "flashinfer"
    assert json.loads(asked.quantization)["vllm"] == {"attention_config": {"flash_attn_version": 2}}
    alone = identity_of(folder, engine_args={"attention_config": {"backend": "FLASHINFER"}})
    assert alone == identity_of(folder, engine_args={"attention_backend": "FLASHINFER"})


def test_only_the_weights_that_are_hashed_are_read(folder, tmp_path):
    """vLLM prefers Mistral's own files where they lie beside those of transformers."""
    settings = settings_of(folder)
    assert (settings["load_format"], settings["config_format"]) == ("safetensors", "hf")
    own = Path(shutil.copytree(folder, tmp_path / "m"))
    vllm_options.check_files(own)
    other = own / "consolidated.safetensors"
    shutil.copy(own / "model.safetensors", other)
    with pytest.raises(ModelError, match=r"would read consolidated.*Move consolidated.safetensors"):
        vllm_options.check_files(own)
    index = own / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": other.name}}))
    with pytest.raises(ModelError, match=rf"Move {index.name}, consolidated"):
        vllm_options.check_files(own)
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    vllm_options.check_files(own)
    (own / "model.safetensors").rename(own / "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    vllm_options.check_files(own)


def test_a_process_with_a_gpu_of_its_own_shows_vllm_that_one():
    assert own_gpu(None, {}) == own_gpu("cpu", {}) == {}
    assert own_gpu("cuda:2", {}) == {"CUDA_VISIBLE_DEVICES": "2"}
    assert own_gpu("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,7"}) == {"CUDA_VISIBLE_DEVICES": "7"}

    assert own_gpu("cuda:1", {"CUDA_VISIBLE_DEVICES": "4, 7"}) == {"CUDA_VISIBLE_DEVICES": "7"}


LOG = """\
(MainProcess pid=1) WARNING 11-26 01:00:00 [base.py:380] ValueError: survived
(Worker pid=3) ERROR 11-26 01:00:01 [worker.py:9] torch.OutOfMemoryError: CUDA out of memory. Tried
(EngineCore pid=2) ERROR 11-26 01:00:01 [core.py:1] RuntimeError: Worker failed with error 'CUDA \
out of memory', please check the stack trace above for the root cause
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_of_a_death_is_found_in_the_log():
    pointing = RuntimeError("Engine core initialization failed. See root cause above.")
    assert cause(LOG, pointing) == "CUDA out of memory"
    assert cause(LOG, ValueError("said here")) == "said here"
    killed = "(EngineCore pid=1) ERROR 11-26 01:00:00 [m.py:1] Worker proc W-1 died unexpectedly"
    assert "was killed" in cause(killed, RuntimeError("cancelled"))
    assert "was killed" in cause("", pointing)


def test_calls_are_of_about_equal_size():
    lengths = [5, 5, 100, 1, 0, 9, 3]
    chunks = list(vllm._chunks(lengths, 10))
    assert chunks == [[0, 1], [2], [3, 4, 5], [6]]
    assert list(vllm._chunks([], 10)) == []


def test_names_of_the_extension_lead_somewhere():
    module, _, name = vllm_options.EXTENSION.rpartition(".")
    assert hasattr(__import__(module, fromlist=[name]), name)
