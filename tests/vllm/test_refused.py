"""What is refused before an engine is started, with the option that does it."""

import pytest

from prift.backends import vllm_engine
from tests.cli_fixtures import precompute, refused


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch-tokens", "99"], "--batch-tokens is for --backend hf; for vLLM it is --max-num"),
        (["--attention", "eager"], "--engine-arg attention_backend=NAME"),
        (["--engine", "ray"], "--engine ray runs --backend hf alone"),
        (["--engine-arg", "dtype=half"], "--engine-arg dtype is set by prift itself: use --dtype"),
        (["--engine-arg", "hf_overrides={}"], "--engine-arg hf_overrides is set by prift itself"),
        (["--engine-arg", "max-model-len=9"], "vLLM calls it max_model_len"),
        (["--engine-arg", "load_format=dummy"], "load_format is set by prift itself"),
        (["--engine-arg", "compilation_config={"], "is no JSON"),
        (["--vllm-mode", "bounds", "--statistics", "extended"], "has no --statistics extended"),
    ],
)
def test_options_that_do_not_go_together(model, data, tmp_path, words, told):
    refused(precompute(model, data, tmp_path / "cache", "--backend", "vllm", *words), told)


@pytest.mark.parametrize(
    "words",
    [["--vllm-mode", "exact"], ["--tensor-parallel-size", "2"], ["--quantization", "fp8"],
     ["--engine-arg", "max_model_len=9"], ["--gpu-memory-utilization", "0.5"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_options_of_vllm_without_it(model, data, tmp_path, words):
    refused(
        precompute(model, data, tmp_path / "cache", *words), f"{words[0]} is for --backend vllm"
    )


@pytest.mark.parametrize(
    ("version", "mode", "told"),
    [
        ("0.13.2", "auto", "vLLM 0.13.2 is too old"),
        ("0.13.2", "bounds", "vLLM 0.13.2 is too old"),
        ("0.27.0", "exact", "--vllm-mode exact needs vLLM 0.28 or later, and this is 0.27"),
    ],
)
def test_versions(model, data, tmp_path, monkeypatch, version, mode, told):
    monkeypatch.setattr(vllm_engine.importlib.metadata, "version", lambda name: version)
    more = ["--backend", "vllm", "--vllm-mode", mode]
    refused(precompute(model, data, tmp_path / "cache", *more), told, "pip install 'prift[vllm]'")


def test_an_older_version_cannot_keep_float32_logits_of_a_half_precision_model(
    model, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(vllm_engine, "version", lambda: (0, 20))
    more = ["--backend", "vllm", "--dtype", "bfloat16"]
    refused(precompute(model, data, tmp_path / "cache", *more), "rounds logits", "--dtype float32")
