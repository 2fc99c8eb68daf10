"""What vLLM is told: the options of precompute as arguments of its engine, and those of them that
are part of the prior's identity."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prift.backends.vllm_worker import columns_for
from prift.errors import ModelError, OptionError
from prift.identity import (
    PriorIdentity,
    canonical_json,
    config_digest,
    quantization_of,
    weights_digest,
)
from prift.models import checkpoint_dtype, context_length, vocabulary_size, weight_files
from prift.stats import CORE, EXTENDED
from prift.store import versions

EXTENSION = "prift.backends.vllm_worker.WorkerExtension"
BATCHED_TOKENS = 2048
"""--max-num-batched-tokens by default: float32 logits of so many rows exist at once, and vLLM does
not reckon with them when it shares out the memory (1.2 GiB at a vocabulary of 151,936)."""
MEMORY = {True: 0.85, False: 0.4}
"""--gpu-memory-utilization by default, with and without an accelerator: leaves room for those
logits; without one, vLLM wants that share of the machine's memory to be free."""
BOUNDS_K = 100  # most probable tokens asked for by default where bounds must do

_OURS = {
    "model": "--model",
    "tokenizer": "--tokenizer",
    "skip_tokenizer_init": None,
    "trust_remote_code": "--trust-remote-code",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "tensor_parallel_size": "--tensor-parallel-size",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "worker_extension_cls": None,
    "hf_overrides": None,
    "hf_config_path": None,
    "revision": None,
    "runner": None,
    "convert": None,
    "logprobs_mode": None,
    "load_format": None,
    "config_format": None,
    "model_weights": None,
    "model_class_overrides": None,
}
"""Engine arguments that prift sets, and the option that does; None: there is none."""
_SAME_NUMBERS = frozenset(
    """
    async_scheduling block_size cpu_offload_gb cudagraph_capture_sizes device_ids
    disable_custom_all_reduce disable_log_stats distributed_executor_backend
    distributed_timeout_seconds enable_chunked_prefill enable_log_requests enable_prefix_caching
    enforce_eager kv_cache_memory_bytes log_level long_prefill_token_threshold
    max_cudagraph_capture_size max_logprobs max_model_len max_num_seqs max_parallel_loading_workers
    num_gpu_blocks_override pipeline_parallel_size safetensors_load_strategy scheduling_policy seed
    served_model_name swap_space use_tqdm_on_load
    """.split()
)
"""Engine arguments about memory, order, place and logs. Any other may change the numbers, so that
it belongs to the prior's identity."""
_MOST = max(columns_for(CORE), columns_for(CORE + EXTENDED))


@dataclass(frozen=True)
class VLLMOptions:
    """See `prift precompute --help`; None: vLLM's default, or ours above."""

    mode: str = "auto"
    tensor_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_batched_tokens: int | None = None
    quantization: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises OptionError for an engine argument that is prift's."""
        for name in self.engine_args:
            plain = name.replace("-", "_")
            if plain in _OURS:
                option = _OURS[plain]
                instead = f": use {option}" if option else ""
                raise OptionError(f"--engine-arg {name} is set by prift itself{instead}")
            if plain != name:
                raise OptionError(f"--engine-arg {name}: vLLM calls it {plain}")
        if self.quantization is not None and not self.quantization.strip():
            raise OptionError("--quantization is empty: name what vLLM calls it, as fp8")
        for name in ("distributed_executor_backend", "data_parallel_backend"):
            if self.engine_args.get(name) == "ray":
                raise OptionError(
                    f"--engine-arg {name}=ray: workers in Ray would not end with prift. "
                    "--tensor-parallel-size spreads a model over one machine's GPUs; "
                    "start a process on each machine for more (--shard i/n)"
                )
        most = self.engine_args.get("max_logprobs", -1)
        if not isinstance(most, int) or most < -1 or 0 <= most < _MOST:
            raise OptionError(
                f"--engine-arg max_logprobs={most}: statistics take {_MOST} or more; -1: all"
            )


def identify(
    folder: Path, config: Any, options: VLLMOptions, *, dtype: str, logits_dtype: str
) -> PriorIdentity:
    """Identity of the prior in `folder` as this backend would run it; loads no weights, and needs
    no vLLM. dtype may be 'auto' (the checkpoint's)."""
    more = _changing_numbers(options)
    stored = quantization_of(config)
    if more:
        both = {"checkpoint": json.loads(stored) if stored else None, "vllm": more}
        stored = canonical_json(both)
    return PriorIdentity(
        weights=weights_digest(weight_files(folder)),
        config=config_digest(config),
        adapter=None,
        dtype=checkpoint_dtype(folder, config) if dtype == "auto" else dtype,
        logits_dtype=logits_dtype,
        attention=_attention(options.engine_args),
        quantization=stored,
        backend="vllm",
        stats_version=versions.STATS_VERSION,
    )


def _changing_numbers(options: VLLMOptions) -> dict[str, Any]:
    """What is asked of vLLM that the other fields of an identity do not say."""
    asked = dict(options.engine_args)
    if isinstance(config := asked.get("attention_config"), dict):
        asked["attention_config"] = {n: v for n, v in config.items() if n != "backend"} or None
    asked.pop("attention_backend", None)
    return {
        name: value
        for name, value in [*asked.items(), ("quantization", options.quantization)]
        if name not in _SAME_NUMBERS and value not in (None, "auto")
    }


def _attention(arguments: Mapping[str, Any]) -> str:
    """'vllm' where vLLM chooses by the machine, else what was asked for."""
    asked = arguments.get("attention_backend")
    if isinstance(config := arguments.get("attention_config"), dict):
        asked = config.get("backend", asked)
    return str(asked).lower() if asked and str(asked).lower() != "auto" else "vllm"


def engine_settings(
    folder: Path,
    config: Any,
    identity: PriorIdentity,
    options: VLLMOptions,
    longest: int | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Arguments of vllm.LLM."""
    limits = [n for n in (longest, context_length(config.get_text_config())) if n]
    settings: dict[str, Any] = {
        "model": str(folder.resolve()),
        "skip_tokenizer_init": True,
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # else consolidated*.safetensors would come first
        "config_format": "hf",  # and params.json
        "dtype": identity.dtype,
        "seed": 0,
        "worker_extension_cls": EXTENSION,
        "tensor_parallel_size": options.tensor_parallel_size or 1,
        "gpu_memory_utilization": options.gpu_memory_utilization
        or MEMORY[torch.accelerator.is_available()],
        "max_num_batched_tokens": options.max_num_batched_tokens or BATCHED_TOKENS,
        "enable_prefix_caching": False,  # a prompt whose log-probabilities are asked for reads none
        "max_logprobs": min(BOUNDS_K, vocabulary_size(config)),
    }
    if limits:
        settings["max_model_len"] = min(limits) + 1  # it insists on room for a token more
    if options.quantization:
        settings["quantization"] = options.quantization
    if identity.dtype != "float32" and not rounds_itself(identity):
        settings["hf_overrides"] = {"head_dtype": "float32"}
    return settings | dict(options.engine_args)


def check_files(folder: Path) -> None:
    """Raises ModelError where vLLM would read other weights than those of the identity: it takes
    every *.safetensors that an index names, or where there is none, every one."""
    ours = {file.name for file in weight_files(folder)}
    theirs = {file.name for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        theirs &= {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
    if ours != theirs:
        raise ModelError(
            f"{folder}: the model is {', '.join(sorted(ours))}, and vLLM would read "
            f"{', '.join(sorted(theirs)) or 'none'}. Move {', '.join(_apart(ours, theirs, index))} "
            "away, or use --backend hf."
        )


def _apart(ours: set[str], theirs: set[str], index: Path) -> list[str]:
    """What to move away so that both read the same."""
    return sorted(theirs - ours) if theirs >= ours else [index.name, *sorted(theirs - ours)]


def rounds_itself(identity: PriorIdentity) -> bool:
    """Whether the model's own logits have the dtype that is asked for."""
    return identity.dtype == identity.logits_dtype
