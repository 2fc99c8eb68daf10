"""What runs inside vLLM's own workers: statistics in place of top tokens.

vLLM answers a request for `prompt_logprobs=K` with K + 1 columns a position: the target, then the K
most probable tokens. Here one function of a worker is exchanged, (logits, targets, K) -> columns,
so that for two values of K, which say which statistics are meant, the columns hold those. All
else stays vLLM's: batching, chunked prefill, tensor parallelism, soft caps, quantised layers, and
the way back to the front end. For any other K the answer is vLLM's own.

    column 0      logprob           selected_token_ranks   rank (int32)
    column 1      log_mass_rank
    column 2      n_tie             a float32, which is exact up to 2^24
    column 3      entropy
    columns 4-6   collision, expected_rank, entropy_top20, where they are asked for

A worker imports this module by name. It knows torch, the statistics and nothing of vLLM until it
is installed.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prift.errors import first_line
from prift.stats import CORE, EXTENDED, TokenStats, tile_sums, token_stats
from prift.store.process import alive, parent_of, pid_of

COLUMNS = ("logprob", "log_mass_rank", "n_tie", "entropy", *EXTENDED)
"""Statistics by column; `rank` has a place of its own."""

OWNER = "PRIFT_VLLM_OWNER"
"""Environment variable of the processes that an engine consists of: the signature of their owner,
so that they watch it from the moment they know this module, long before the model is loaded."""

_LOOK_SECONDS = 2.0
_watching: set[int] = set()  # ids of processes, since one may be a copy of another
_CORE_K = 3
_ALL_K = len(COLUMNS) - 1
_BLOCK = 1 << 26
"""Logits handled at once on a GPU, of which there are a few copies in float32 of 256 MiB each. On a
CPU `stats.token_stats` keeps blocks in its cache."""


def columns_for(names: Sequence[str]) -> int:
    """The K that asks for these statistics."""
    return _ALL_K if set(names) & set(EXTENDED) else _CORE_K


def is_ours(K: int) -> bool:
    """Whether this K asks for statistics."""
    return K in (_CORE_K, _ALL_K)


def pack(
    logits_NV: Tensor,
    targets_N: Tensor,
    K: int,
    rounded: bool = False,
    sums: Callable[..., Tensor] = tile_sums,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token ids int32 [N, K+1], columns float32 [N, K+1], ranks int64 [N]) in vLLM's form.

    rounded  the logits are rounded to bfloat16 first

    Ids are the target and 0, 1, ... K-1, which say that the columns are these. A row that is no
    distribution has a NaN in column 0.
    """
    if rounded:
        logits_NV = logits_NV.bfloat16()
    names = CORE if K == _CORE_K else CORE + EXTENDED
    rows = None if logits_NV.device.type == "cpu" else max(1, _BLOCK // logits_NV.shape[1])
    targets_N = targets_N.long()
    stats = token_stats(logits_NV, targets_N, names, block_rows=rows, sums=sums)
    columns_NK = torch.stack([getattr(stats, name).float() for name in COLUMNS[: K + 1]], 1)
    marks_K = torch.arange(K, device=logits_NV.device).clamp_max(logits_NV.shape[1] - 1)
    ids_NK = torch.cat([targets_N[:, None], marks_K.expand(len(targets_N), -1)], 1)
    return ids_NK.int(), columns_NK, stats.rank.long()


def unpack(columns_NK: np.ndarray, ranks_N: np.ndarray, names: Sequence[str]) -> TokenStats:
    """The statistics `names` from the columns [N, K+1] and ranks [N] that came back."""
    whole = {"rank": ranks_N, "n_tie": np.nan_to_num(columns_NK[:, COLUMNS.index("n_tie")])}
    values = {name: torch.from_numpy(whole[name].astype(np.int32)) for name in whole}
    for name in names:
        if name not in whole:
            column = columns_NK[:, COLUMNS.index(name)].astype(np.float32)
            values[name] = torch.from_numpy(column)
    return TokenStats(**{name: values[name] for name in names})


class Statistics:
    """The exchanged functions. Rows of logits come in the forms in which vLLM's runners have them;
    `answer` is the class that they return.

    rounded, sums  see `pack`

    dtypes  names of those that logits have had so far
    """

    def __init__(self, answer: type, rounded: bool, sums: Callable[..., Tensor] = tile_sums):
        self._answer, self._rounded, self._sums = answer, rounded, sums
        self.dtypes: set[str] = set()

    def gather(self, own: Callable[..., Any], own_logprobs: Callable[[Tensor], Tensor]) -> Callable:
        """For `sampler.gather_logprobs` of the V1 runner, where `sampler.compute_logprobs` hands
        its logits on."""

        def gather_logprobs(logits: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
            if is_ours(num_logprobs):
                return self._columns(logits, token_ids, num_logprobs)
            return own(own_logprobs(logits), num_logprobs, token_ids)

        return gather_logprobs

    def scores(self, own: Callable[..., Any]) -> Callable:
        """For `compute_topk_scores` of the V2 runner, which has a chunk of logits."""

        def compute_topk_scores(
            logits: Tensor, num_logprobs: int, token_ids: Tensor, *rest: Any, **more: Any
        ) -> Any:
            if is_ours(num_logprobs):
                return self._columns(logits, token_ids, num_logprobs)
            return own(logits, num_logprobs, token_ids, *rest, **more)

        return compute_topk_scores

    def _columns(self, logits_NV: Tensor, targets_N: Tensor, K: int) -> Any:
        self.dtypes.add(str(logits_NV.dtype).removeprefix("torch."))
        return self._answer(*pack(logits_NV, targets_N, K, self._rounded, self._sums))


def watch(owner: str) -> None:
    """Ends this worker, and vLLM's process that started it, once the process of this signature
    (prift.store.process) is gone: vLLM would go on for ever, and keep a GPU's memory. Once in each
    process."""
    if alive(owner) is None or os.getpid() in _watching:  # None: of another machine
        return
    _watching.add(os.getpid())
    mother = os.getppid()
    is_engine = parent_of(mother) == pid_of(owner)  # else it is the owner, or nothing of vLLM's

    def look() -> None:
        while alive(owner):
            time.sleep(_LOOK_SECONDS)
        if is_engine and os.getppid() == mother:
            os.kill(mother, signal.SIGKILL)  # it would wait for an answer
        os._exit(1)

    threading.Thread(target=look, name="prift-watch", daemon=True).start()


class WorkerExtension:
    """Mixed into vLLM's worker class; its methods are called by `LLM.collective_rpc`."""

    def prift_install(self, rounded: bool, compiled: bool | None) -> tuple[bool, str]:
        """(whether the functions were exchanged, which runner's; else why not).

        compiled  whether the sums over the vocabulary are compiled; None: on a GPU, where it works
        """
        from vllm.v1.outputs import LogprobsTensors

        runner = self.model_runner
        sums, told = _sums(runner.device, compiled)
        self._prift = statistics = Statistics(LogprobsTensors, rounded, sums)
        sampler = getattr(runner, "sampler", None)
        if hasattr(runner, "_get_prompt_logprobs_dict") and hasattr(sampler, "gather_logprobs"):
            own, own_logprobs = sampler.gather_logprobs, sampler.compute_logprobs
            sampler.gather_logprobs = statistics.gather(own, own_logprobs)
            sampler.compute_logprobs = _unchanged

            def put_back() -> None:
                del sampler.gather_logprobs, sampler.compute_logprobs

            self._prift_put_back = put_back
            return True, f"V1 runner{told}"
        return self._prift_install_v2(statistics, told)

    def _prift_install_v2(self, statistics: Statistics, told: str) -> tuple[bool, str]:
        try:
            from vllm.v1.worker.gpu.sample import prompt_logprob as module
        except ImportError as error:
            return False, f"its workers have neither of the functions that prift knows ({error})"
        name = "compute_topk_scores"
        runner = type(self.model_runner)
        if not hasattr(self.model_runner, "prompt_logprobs_worker") or not hasattr(module, name):
            return False, f"{runner.__module__}.{runner.__name__} has no function that prift knows"
        own = getattr(module, name)
        setattr(module, name, statistics.scores(own))
        self._prift_put_back = lambda: setattr(module, name, own)
        return True, f"V2 runner{told}"

    def prift_watch(self, owner: str) -> None:
        """See `watch`."""
        watch(owner)

    def prift_dtypes(self) -> list[str]:
        """Names of the dtypes in which logits have come."""
        return sorted(self._prift.dtypes) if hasattr(self, "_prift") else []

    def prift_remove(self) -> None:
        """The worker as it was."""
        put_back = self.__dict__.pop("_prift_put_back", None)
        if put_back is not None:
            put_back()


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _sums(device: torch.device, compiled: bool | None) -> tuple[Callable[..., Tensor], str]:
    """The sums over the vocabulary, and what to say of them."""
    if compiled is False or (compiled is None and device.type == "cpu"):
        return tile_sums, ""
    from prift.fold import compiled_sums

    try:
        return compiled_sums(device.type), ", compiled"
    except Exception as error:  # whatever a machine's compilers and their caches may raise
        if compiled:
            why = f"--compile: the sums do not compile here: {first_line(error)}"
            raise RuntimeError(why) from error
        return tile_sums, f", not compiled: {type(error).__name__}"


if os.environ.get(OWNER):
    watch(os.environ[OWNER])
