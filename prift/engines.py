"""Who runs the prior: the options of precompute that say so, and the backend they choose."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prift.backends import Scorer, hf, ray_data, vllm
from prift.backends.vllm_bounds import STATISTICS as WITHOUT_ENTROPY
from prift.errors import ModelError, OptionError
from prift.identity import PriorIdentity
from prift.shards import Shard
from prift.stats import STATISTICS
from prift.text.examples import WINDOW_ROWS


@dataclass(frozen=True)
class PrecomputeOptions:
    """How the prior is run. See `prift precompute --help`.

    window_rows  see examples.load_windows; None: what suits the engine
    shard        the share of the sequences that is scored here; None: all
    device       see placement.place
    engine_args  arguments of vLLM's engine by name
    """

    dtype: str = "auto"
    logits_dtype: str = "float32"
    attention: str = "auto"
    positions: str = "labels"
    statistics: str = "core"
    batch_tokens: int | None = None
    compiled: bool | None = None
    part_seconds: float = 60.0
    storage: str = "float32"
    trust_remote_code: bool = False
    backend: str = "hf"
    engine: str = "local"
    ray_workers: int | None = None
    ray_gpus: int | None = None
    vllm_mode: str = "auto"
    tensor_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_batched_tokens: int | None = None
    quantization: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    window_rows: int | None = None
    shard: Shard | None = None
    device: str | None = None


_FOR = {  # options that one backend or engine alone has: their flags
    "ray": {"ray_workers": "--ray-workers", "ray_gpus": "--ray-gpus"},
    "hf": {"batch_tokens": "--batch-tokens", "attention": "--attention"},
    "vllm": {
        "vllm_mode": "--vllm-mode",
        "tensor_parallel_size": "--tensor-parallel-size",
        "gpu_memory_utilization": "--gpu-memory-utilization",
        "max_num_batched_tokens": "--max-num-batched-tokens",
        "quantization": "--quantization",
        "engine_args": "--engine-arg",
    },
}
_INSTEAD = {
    "--batch-tokens": "--max-num-batched-tokens",
    "--attention": "--engine-arg attention_backend=NAME",
}
_DEFAULTS = PrecomputeOptions()


def check_options(options: PrecomputeOptions) -> None:
    """Raises OptionError for options of another backend or engine than the one chosen, and for
    what is not installed."""
    chosen = {options.backend, options.engine}
    for owner in _FOR.keys() - chosen:
        for name, flag in _FOR[owner].items():
            if getattr(options, name) != getattr(_DEFAULTS, name):
                kind = "engine" if owner == "ray" else "backend"
                instead = f"; for vLLM it is {_INSTEAD[flag]}" if flag in _INSTEAD else ""
                raise OptionError(f"{flag} is for --{kind} {owner}{instead}")
    if options.backend == "vllm":
        if options.engine == "ray":
            raise OptionError(
                "--engine ray runs --backend hf alone. Start a process with --backend vllm on each "
                "machine (--shard i/n), or spread one model with --tensor-parallel-size"
            )
        if options.statistics != "core" and options.vllm_mode == "bounds":
            raise OptionError(f"--vllm-mode bounds has no --statistics {options.statistics}")
        vllm.check_installed(_vllm_options(options))
    if options.engine == "ray":
        ray_data.check_installed()


def identify(folder: Path, config: Any, options: PrecomputeOptions) -> PriorIdentity:
    """Of the prior that these options run."""
    dtypes = {"dtype": options.dtype, "logits_dtype": options.logits_dtype}
    if options.backend == "vllm":
        return vllm.identify(folder, config, _vllm_options(options), **dtypes)
    return hf.identify(folder, config, attention=options.attention, **dtypes)


def statistics_of(options: PrecomputeOptions, scorer: Scorer | None = None) -> Sequence[str]:
    """Names of the statistics that are stored of every token; with a scorer, those that it gives.
    Raises ModelError where more were asked for than it can do without."""
    if options.backend == "vllm" and options.vllm_mode == "bounds":
        return WITHOUT_ENTROPY
    if isinstance(scorer, vllm.VLLMScorer) and not scorer.exact:
        if options.statistics != "core":
            raise ModelError(
                f"--statistics {options.statistics} needs statistics from vLLM's workers, which "
                "there are none of here. pip install 'prift[vllm]' takes a version of vLLM that "
                "gives them; or use --backend hf"
            )
        return WITHOUT_ENTROPY
    return STATISTICS[options.statistics]


def suited_rows(options: PrecomputeOptions) -> int:
    """Rows of a window for the engine."""
    return ray_data.WINDOW_ROWS if options.engine == "ray" else WINDOW_ROWS


def load_scorer(
    model: str,
    folder: Path,
    config: Any,
    identity: PriorIdentity,
    options: PrecomputeOptions,
    say: Callable[[str], None],
    longest: int | None = None,
) -> Scorer:
    """longest: tokens of a sequence, at most, where that is known. Raises whatever a backend raises
    that cannot load the model."""
    how: dict[str, Any] = {
        "compiled": options.compiled,
        "trust_remote_code": options.trust_remote_code,
        "say": say,
    }
    if options.backend == "vllm":
        more = {"longest": longest, "device": options.device}
        return vllm.load(folder, config, identity, _vllm_options(options), **more, **how)
    how["batch_tokens"] = options.batch_tokens
    if options.engine == "ray":
        share = {"workers": options.ray_workers, "gpus": options.ray_gpus}
        return ray_data.load(model, identity, **share, **how)
    return hf.load(folder, config, identity, device=options.device, **how)


def _vllm_options(options: PrecomputeOptions) -> vllm.VLLMOptions:
    return vllm.VLLMOptions(
        mode=options.vllm_mode,
        tensor_parallel_size=options.tensor_parallel_size,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_num_batched_tokens=options.max_num_batched_tokens,
        quantization=options.quantization,
        engine_args=options.engine_args,
    )


class Prior:
    """What a run scores with; a context manager, which ends what was started.

    longest  tokens of a sequence, at most, where that is known
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        config: Any,
        options: PrecomputeOptions,
        say: Callable[[str], None],
        longest: int | None = None,
    ):
        self._model, self._folder, self._config = model, folder, config
        self._options, self._say, self._longest = options, say, longest
        self._scorer: Scorer | None = None

    @functools.cached_property
    def identity(self) -> PriorIdentity:
        """Hashes the weights when first asked for."""
        return identify(self._folder, self._config, self._options)

    def scorer(self) -> Scorer:
        """Loads the model when first called. Raises what `load_scorer` raises."""
        if self._scorer is None:
            how = (self.identity, self._options, self._say, self._longest)
            self._scorer = load_scorer(self._model, self._folder, self._config, *how)
        return self._scorer

    def __enter__(self) -> "Prior":
        return self

    def __exit__(self, *_: object) -> None:
        if self._scorer is not None:
            self._scorer.close()
