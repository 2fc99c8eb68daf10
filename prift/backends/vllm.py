"""The prior run by vLLM: token ids in, statistics out.

vLLM batches prompts by itself, cuts long ones, spreads models over GPUs and runs quantised ones.
Two ways to the statistics:

exact   its workers compute them from the logits (vllm_worker.py), all of them, every token. Whether
        that works with the vLLM that is installed is tried at start (vllm_selftest.py).
bounds  what its public answer says for certain (vllm_bounds.py): no entropy, and a sequence with a
        token of which it says too little is left out. Never a guess.

Logits are float32, by a head of that dtype, unless asked for otherwise: vLLM's own rounding to
bfloat16 would tie most targets with other tokens. Prompts run over the vocabulary whole, whatever
positions are asked for, up to the last of them.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prift.backends import BadLogits, TooLong
from prift.backends import vllm_engine as engine
from prift.backends.vllm_bounds import STATISTICS as WITHOUT_ENTROPY
from prift.backends.vllm_bounds import known_stats
from prift.backends.vllm_engine import EXTENSION, Engine
from prift.backends.vllm_selftest import PUBLIC_K, fault, probe
from prift.backends.vllm_worker import columns_for, unpack
from prift.errors import ModelError, OptionError
from prift.identity import (
    PriorIdentity,
    canonical_json,
    config_digest,
    quantization_of,
    weights_digest,
)
from prift.models import (
    checkpoint_dtype,
    context_length,
    turns_by_length,
    vocabulary_size,
    weight_files,
)
from prift.stats import CORE, NotADistribution, TokenStats
from prift.store import versions

BATCHED_TOKENS = 2048
"""--max-num-batched-tokens by default: float32 logits of so many rows exist at once, and vLLM does
not reckon with them when it shares out the memory (1.2 GiB at a vocabulary of 151,936)."""
GPU_MEMORY = 0.85  # --gpu-memory-utilization by default: leaves room for those logits
BOUNDS_K = 100  # most probable tokens asked for by default where bounds must do

_STEPS = 32  # of the engine, in a call: its last is not full, and rows are safe once it is over
_LISTED = 1 << 22  # numbers in the answers to a call

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
}
"""Engine arguments that prift sets, and the option that does; None: there is none."""
_NUMBERS = ("kv_cache_dtype", "calculate_kv_scales", "quantization_config", "model_impl")
"""Engine arguments that change the numbers, so that they belong to the prior's identity."""


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
        if self.engine_args.get("load_format") == "dummy":
            raise OptionError("--engine-arg load_format=dummy would score a model without weights")


def identify(
    folder: Path, config: Any, options: VLLMOptions, *, dtype: str, logits_dtype: str
) -> PriorIdentity:
    """Identity of the prior in `folder` as this backend would run it; loads no weights, and needs
    no vLLM. dtype may be 'auto' (the checkpoint's)."""
    more = {n: options.engine_args[n] for n in _NUMBERS if n in options.engine_args}
    if options.quantization:
        more["quantization"] = options.quantization
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


def _attention(arguments: Mapping[str, Any]) -> str:
    """'vllm' where vLLM chooses by the machine, else what was asked for."""
    asked = arguments.get("attention_backend")
    if isinstance(config := arguments.get("attention_config"), dict):
        asked = config.get("backend", asked)
    return str(asked).lower() if asked else "vllm"


def check_installed(options: VLLMOptions) -> tuple[int, int]:
    """vLLM's version. Raises OptionError where it is absent, or does not do what is asked."""
    options.check()
    found = engine.version()
    first, _ = engine.SUPPORTED
    if found < first and options.mode == "exact":
        raise OptionError(
            f"--vllm-mode exact needs vLLM {engine.shown(first)} or later, and this is "
            f"{engine.shown(found)}: pip install 'prift[vllm]', or --vllm-mode bounds"
        )
    return found


def load(
    folder: Path,
    config: Any,
    identity: PriorIdentity,
    options: VLLMOptions,
    *,
    longest: int | None = None,
    compiled: bool | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> "VLLMScorer":
    """Starts vLLM with the prior that `identify` described.

    longest  tokens of a sequence, at most, where that is known; else what the model is made for

    Raises OptionError, ModelError.
    """
    found = check_installed(options)
    _check_numbers(folder, config, identity, found)
    settings = engine_settings(folder, config, identity, options, longest, trust_remote_code)
    exact = options.mode != "bounds" and found >= engine.SUPPORTED[0]
    if exact:
        settings["worker_extension_cls"] = EXTENSION
    if device and (options.tensor_parallel_size or 1) > 1:
        raise OptionError(
            f"this process was given {device} alone: --tensor-parallel-size spreads a model that "
            "one process has several GPUs for. Start one process for them"
        )
    started = Engine(settings, device)
    try:
        return VLLMScorer(started, config, identity, options, found, exact, compiled, say)
    except BaseException:
        started.close()
        raise


def _check_numbers(
    folder: Path, config: Any, identity: PriorIdentity, found: tuple[int, int]
) -> None:
    """Raises where vLLM's numbers would not be what the identity says."""
    if turns_by_length(config):
        raise ModelError(
            f"{folder}: its positions turn by angles that depend on how long a sequence is, and in "
            "vLLM on how long one may be, so its numbers would be others. Use --backend hf."
        )
    kept = identity.dtype == identity.logits_dtype
    if found < engine.SUPPORTED[0] and not kept:
        raise OptionError(
            f"vLLM {engine.shown(found)} rounds logits to {identity.dtype} whatever is asked: take "
            f"{engine.shown(engine.SUPPORTED[0])} or later, or --dtype float32"
        )


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
        "model": str(folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": trust_remote_code,
        "dtype": identity.dtype,
        "seed": 0,
        "tensor_parallel_size": options.tensor_parallel_size or 1,
        "gpu_memory_utilization": options.gpu_memory_utilization or GPU_MEMORY,
        "max_num_batched_tokens": options.max_num_batched_tokens or BATCHED_TOKENS,
        "enable_prefix_caching": False,  # a prompt whose log-probabilities are asked for reads none
        "max_logprobs": min(BOUNDS_K, vocabulary_size(config)),
    }
    if limits:
        settings["max_model_len"] = min(limits) + 1  # it insists on room for a token more
    if options.quantization:
        settings["quantization"] = options.quantization
    if identity.dtype != "float32" and not _rounds_itself(identity):
        settings["hf_overrides"] = {"head_dtype": "float32"}
    return settings | dict(options.engine_args)


def _rounds_itself(identity: PriorIdentity) -> bool:
    """Whether the model's own logits have the dtype that is asked for."""
    return identity.dtype == identity.logits_dtype


class VLLMScorer:
    """A backends.Scorer over a started engine.

    found     vLLM's version
    exact     whether its workers have the extension
    compiled  whether their sums over the vocabulary are compiled; None: on a GPU

    Raises ModelError where --vllm-mode exact is asked for and the self-test fails.
    """

    def __init__(
        self,
        started: Engine,
        config: Any,
        identity: PriorIdentity,
        options: VLLMOptions,
        found: tuple[int, int],
        exact: bool,
        compiled: bool | None,
        say: Callable[[str], None],
    ):
        self.identity = identity
        self._engine, self._say, self._options = started, say, options
        self._vocabulary = vocabulary_size(config)
        self._version = engine.shown(found)
        if found >= engine.SUPPORTED[1]:
            say(f"vLLM {self._version} is newer than what prift was tried with")
        why, how = self._install(compiled) if exact else (None, "")
        if why is not None and options.mode == "exact":
            raise ModelError(
                f"--vllm-mode exact does not work with vLLM {self._version}: {why}. "
                "pip install 'prift[vllm]' takes a version that it works with; --vllm-mode bounds "
                "does without (docs/backends.md)."
            )
        self.exact = exact and why is None
        if self.exact:
            say(f"vLLM {self._version}: statistics from its workers ({how})")
            return
        reason = f": {why}" if why is not None else ""
        say(
            f"vLLM {self._version}: no statistics from its workers{reason}. Its {self._listed} "
            "most probable tokens must do (--vllm-mode bounds): no entropy, and sequences with "
            "a token that they leave open are not stored"
        )
        if identity.logits_dtype == "bfloat16" and not _rounds_itself(identity):
            raise ModelError("--logits-dtype bfloat16 needs --vllm-mode exact, or --dtype bfloat16")

    def _install(self, compiled: bool | None) -> tuple[str | None, str]:
        """(why the exact way does not work, how it works). Where it does not, the workers are as
        they were."""
        rounded = self.identity.logits_dtype == "bfloat16"
        answers = self._engine.call("prift_install", rounded, compiled)
        told = sorted({words for _, words in answers})
        why = None if all(done for done, _ in answers) else "; ".join(told)
        if why is None:
            why = self._self_test()
        if why is not None:
            self._engine.call("prift_remove")
        return why, "; ".join(told)

    def _self_test(self) -> str | None:
        """Prompts one by one, so that both ways run them alike."""
        K = min(PUBLIC_K, self._vocabulary)
        for prompt in probe(self._vocabulary, self._engine.longest):
            try:
                (ours,) = self._engine.ask([prompt], columns_for(CORE))
            except ModelError as error:
                return str(error)
            (public,) = self._engine.ask([prompt], K)
            targets = np.array(prompt[1:])
            rounded = {self.identity.dtype, self.identity.logits_dtype} - {"float32"}
            dtype = "bfloat16" if rounded else "float32"
            why = fault(ours, public, targets, self._vocabulary, dtype)
            if why is not None:
                return f"in the self-test {why}"
        return None

    @property
    def _listed(self) -> int:
        """Most probable tokens asked for, where bounds must do."""
        most = self._options.engine_args.get("max_logprobs", BOUNDS_K)
        return self._vocabulary if most == -1 else min(int(most), self._vocabulary)

    @property
    def device_name(self) -> str:
        """vLLM's version and mode, and the devices, for provenance."""
        cuda = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
        size = self._options.tensor_parallel_size or 1
        return f"vLLM {self._version} {'exact' if self.exact else 'bounds'}, {size} x {name}"

    def close(self) -> None:
        """Ends vLLM's processes."""
        self._engine.close()

    def score(
        self,
        sequences: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        names: Sequence[str] = CORE,
    ) -> Iterator[tuple[int, TokenStats]]:
        """See backends.Scorer. Where bounds must do: WITHOUT_ENTROPY, and nothing of a sequence
        that they leave open. Raises TooLong before anything is run; ModelError where vLLM dies."""
        if not self.exact:
            names = tuple(name for name in names if name in WITHOUT_ENTROPY)
        lengths = [int(where[-1]) + 1 if len(where) else 0 for where in positions]
        for i, length in enumerate(lengths):
            if length > self._engine.longest:
                raise TooLong(i, self._engine.longest)
        K = columns_for(names) if self.exact else self._listed
        most = min(_STEPS * self._engine.step_tokens, max(_LISTED // (K + 1), 1))
        for chunk in _chunks(lengths, most):
            prompts = [sequences[i][: lengths[i]].tolist() for i in chunk if lengths[i]]
            answers = iter(self._engine.ask(prompts, K) if prompts else [])
            for i in chunk:
                if not lengths[i]:
                    yield i, _nothing(names)
                    continue
                stats = self._stats(i, sequences[i], positions[i], next(answers), names)
                if stats is not None:
                    yield i, stats

    def _stats(
        self,
        index: int,
        sequence: np.ndarray,
        where: np.ndarray,
        answer: tuple[np.ndarray, ...],
        names: Sequence[str],
    ) -> TokenStats | None:
        """At these positions; None where bounds leave one open. Raises BadLogits, ModelError."""
        ids, columns, ranks = (part[where - 1] for part in answer)
        if not (ids[:, 0] == sequence[where]).all():
            raise ModelError("vLLM answered about other tokens than it was asked about")
        if self.exact:
            stats = unpack(columns, ranks, names)
            known = True
        else:
            stats, each = known_stats(columns, ranks, self._vocabulary)
            known = bool(each.all())
        try:
            stats.check()
        except NotADistribution as error:
            raise BadLogits(index, int(where[error.row])) from error
        return stats if known else None


def _chunks(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Runs of indices of about `most` tokens; one longer sequence is a run of its own."""
    chunk, size = [], 0
    for i, length in enumerate(lengths):
        if chunk and size + length > most:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += length
    if chunk:
        yield chunk


def _nothing(names: Sequence[str]) -> TokenStats:
    return unpack(np.zeros((0, columns_for(names) + 1)), np.zeros(0, np.int64), names)
