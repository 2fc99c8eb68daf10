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

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prift.backends import BadLogits, TooLong
from prift.backends import vllm_engine as engine
from prift.backends.vllm_bounds import STATISTICS as WITHOUT_ENTROPY
from prift.backends.vllm_bounds import known_stats
from prift.backends.vllm_engine import Engine
from prift.backends.vllm_options import (
    VLLMOptions,
    check_files,
    engine_settings,
    identify,
    rounds_itself,
)
from prift.backends.vllm_selftest import install
from prift.backends.vllm_worker import columns_for, unpack
from prift.errors import ModelError, OptionError
from prift.identity import PriorIdentity
from prift.models import context_length, turns_by_length, vocabulary_size
from prift.stats import CORE, NotADistribution, TokenStats

__all__ = ["VLLMOptions", "VLLMScorer", "check_installed", "identify", "load"]

_STEPS = 32  # of the engine, in a call: its last is not full, and rows are safe once it is over
_LISTED = 1 << 22  # numbers in the answers to a call


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
    check_files(folder)
    _check_numbers(folder, config, identity, found)
    settings = engine_settings(folder, config, identity, options, longest, trust_remote_code)
    exact = options.mode != "bounds" and found >= engine.SUPPORTED[0]
    if device and (options.tensor_parallel_size or 1) > 1:
        raise OptionError(
            f"this process was given {device} alone: --tensor-parallel-size spreads a model that "
            "one process has several GPUs for. Start one process for them"
        )
    start = functools.partial(Engine, settings, device)
    return VLLMScorer(start, config, identity, options, found, exact, compiled, say)


def _check_numbers(
    folder: Path, config: Any, identity: PriorIdentity, found: tuple[int, int]
) -> None:
    """Raises where vLLM's numbers would not be what the identity says."""
    if turns_by_length(config):
        raise ModelError(
            f"{folder}: its positions turn by angles that depend on how long a sequence is, and in "
            "vLLM on how long one may be, so its numbers would be others. Use --backend hf."
        )
    if found < engine.SUPPORTED[0] and not rounds_itself(identity):
        raise OptionError(
            f"vLLM {engine.shown(found)} rounds logits to {identity.dtype} whatever is asked: take "
            f"{engine.shown(engine.SUPPORTED[0])} or later, or --dtype float32"
        )


class VLLMScorer:
    """A backends.Scorer over an engine.

    start     starts one
    found     vLLM's version
    exact     whether to try the exact way
    compiled  whether the sums over the vocabulary are compiled; None: on a GPU

    Raises ModelError where vLLM cannot run the model, and where --vllm-mode exact is asked for and
    the self-test fails.
    """

    def __init__(
        self,
        start: Callable[[], Engine],
        config: Any,
        identity: PriorIdentity,
        options: VLLMOptions,
        found: tuple[int, int],
        exact: bool,
        compiled: bool | None,
        say: Callable[[str], None],
    ):
        self.identity = identity
        self._options, self._vocabulary = options, vocabulary_size(config)
        self._context = context_length(config.get_text_config())
        self._version = engine.shown(found)
        if found >= engine.SUPPORTED[1]:
            say(f"vLLM {self._version} is newer than what prift was tried with")
        self._engine = start()
        try:
            why, how = install(self._engine, self._vocabulary, identity, compiled, exact)
            self.exact = why is None
            if self.exact:
                say(f"vLLM {self._version}: statistics from its workers ({how})")
                return
            if not exact:
                old = f"it is older than {engine.shown(engine.SUPPORTED[0])}"
                why = "as asked" if options.mode == "bounds" else old
            self._refuse_or_tell(why, say)
            if not self._engine.alive:  # the exchanged function broke it
                self._engine.close()
                self._engine = start()
        except BaseException:
            self._engine.close()
            raise

    def _refuse_or_tell(self, why: str, say: Callable[[str], None]) -> None:
        """Raises ModelError where bounds will not do."""
        if self._options.mode == "exact":
            raise ModelError(
                f"--vllm-mode exact does not work with vLLM {self._version}: {why}. "
                "pip install 'prift[vllm]' takes a version that it works with; --vllm-mode bounds "
                "does without (docs/backends.md)."
            )
        if self.identity.logits_dtype == "bfloat16" and not rounds_itself(self.identity):
            raise ModelError(
                f"vLLM {self._version} gives no statistics from its workers: {why}. Without, "
                "--logits-dtype bfloat16 needs --dtype bfloat16."
            )
        say(
            f"vLLM {self._version}: no statistics from its workers: {why}. Its "
            f"{self._engine.most_listed} most probable tokens must do (--vllm-mode bounds): no "
            "entropy, and sequences with a token that they leave open are not stored"
        )

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
        longest = min(self._engine.longest, self._context or self._engine.longest)
        for i, length in enumerate(lengths):
            if length > longest:
                raise TooLong(i, longest)
        K = columns_for(names) if self.exact else self._engine.most_listed
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
