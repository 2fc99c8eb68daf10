"""What is refused before vLLM is started, what its engine is told, and the prior's identity."""

import json
from dataclasses import replace

import pytest

from prift.backends import vllm, vllm_engine, vllm_options
from prift.backends.vllm_engine import own_gpu, parse_version
from prift.backends.vllm_log import cause
from prift.backends.vllm_options import VLLMOptions, engine_settings, identify
from prift.engines import PrecomputeOptions, check_options, statistics_of
from prift.errors import OptionError
from prift.models import load_config
from prift.stats import CORE
from tests import cli_fixtures as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cli.make_model(tmp_path_factory.mktemp("model") / "m")


def identity_of(folder, dtype="auto", logits_dtype="float32", **options):
    from pathlib import Path

    config = load_config(Path(folder))
    return identify(
        Path(folder), config, VLLMOptions(**options), dtype=dtype, logits_dtype=logits_dtype
    )


def settings_of(folder, longest=None, dtype="float32", logits_dtype="float32", **options):
    from pathlib import Path

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
        ("load_format", "dummy", "without weights"),
    ],
)
def test_engine_arguments_that_are_prifts_are_refused(name, value, message):
    with pytest.raises(OptionError, match=message):
        VLLMOptions(engine_args={name: value}).check()


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
    assert identity_of(folder, **same, engine_args={"max_model_len": 30}) == plain
    quantised = identity_of(folder, quantization="fp8", engine_args={"kv_cache_dtype": "fp8"})
    assert json.loads(quantised.quantization) == {
        "checkpoint": None,
        "vllm": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    }
    assert identity_of(folder, engine_args={"attention_backend": "FLASHINFER"}).differences(
        plain
    ) == {"attention": ("flashinfer", "vllm")}
    assert identity_of(folder, dtype="bfloat16").id != plain.id


def test_a_process_with_a_gpu_of_its_own_shows_vllm_that_one():
    assert own_gpu(None, {}) == own_gpu("cpu", {}) == {}
    assert own_gpu("cuda:2", {}) == {"CUDA_VISIBLE_DEVICES": "2"}
    assert own_gpu("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,7"}) == {"CUDA_VISIBLE_DEVICES": "7"}


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
