"""What vLLM's processes write, kept off the terminal; and what it says of why an engine died.

They write to the file descriptors that they were started with, so those lead here meanwhile. The
file has no name, and is gone with the last process that holds it; where an engine died it is kept.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_ADVICE = (
    (
        r"out of memory|OutOfMemory|can't allocate memory|Cannot allocate memory|bad_alloc"
        r"|could not create a (primitive|memory)",
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
        "The output projection of this model is quantised: use --dtype bfloat16 --logits-dtype "
        "bfloat16",
    ),
    (
        r"not supported for now|no vLLM implementation|architectures? .*not|Unrecognized model",
        "vLLM does not know this model: use --backend hf",
    ),
    (
        r"[Uu]nsupported .*attention|head.?dim|head size",
        "vLLM has no attention for this model on this machine: use --backend hf",
    ),
    (r"unexpected keyword argument|extra_forbidden|Extra inputs", "Check --engine-arg"),
)


class Log:
    """One engine's."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+", buffering=1)

    @contextmanager
    def taking_output(self) -> Iterator[None]:
        """Processes started inside write to the log for as long as they live. What this one says
        on sys.stderr goes where it went."""
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        python = sys.stderr
        try:
            with contextlib.suppress(OSError, ValueError):  # not a file: a test's, a notebook's
                if python.fileno() == 2:
                    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
            os.dup2(self._file.fileno(), 1)
            os.dup2(self._file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            for target, saved in enumerate(kept, start=1):
                os.dup2(saved, target)
                os.close(saved)
            if sys.stderr is not python:
                sys.stderr.close()
                sys.stderr = python

    def take_logger(self) -> None:
        """vLLM's own lines of this process."""
        logger = logging.getLogger("vllm")
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(logging.StreamHandler(self._file))
        logger.propagate = False

    def reason(self, error: BaseException) -> str:
        """Why the engine died, what to do about it where that is known, and where the log is kept.

        error  what was raised here
        """
        number = self._file.fileno()
        content = os.pread(number, os.fstat(number).st_size, 0)  # its position is its writers'
        handle, kept = tempfile.mkstemp(prefix="prift-vllm-", suffix=".log")
        with open(handle, "wb") as file:
            file.write(content)
        why = cause(content.decode(errors="replace"), error)
        advice = next((f" {text}." for words, text in _ADVICE if re.search(words, why)), "")
        return f"{why.rstrip('.')}.{advice} (vLLM's log: {kept})"


def cause(log: str, error: Exception) -> str:
    """What an engine died of: the last error in its log that does not only point at another, else
    that which was raised here."""
    found = []
    for line in log.splitlines():
        begins = _LINE.match(line)
        if begins[1] in ("DEBUG", "INFO", "WARNING"):  # a traceback there is of what was survived
            continue
        line = line[begins.end() :].strip()
        if inner := re.search(r"Worker failed with error '(.+)', please check", line):
            found.append(inner[1])
            continue
        named = re.match(r"([A-Za-z_][\w.]*(?:Error|Exception))(?:: (.+))?$", line)
        if named and not re.search(_POINTING, line):
            found.append((named[2] or named[1]) if named[1] in _PLAIN else line)
        elif re.search(r"died unexpectedly|EngineCore.* died|Segmentation fault", line):
            found.append(_KILLED)
    own = " ".join(str(error).split()).partition(" [type=")[0]  # of a validation, several lines
    if own and not re.search(_POINTING, own):
        return own
    return found[-1] if found else _KILLED


_LINE = re.compile(r"(?:\([^)]*\)\s*)*(?:([A-Z]+) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?")
_POINTING = re.compile(
    "root cause|EngineDeadError|initialization failed|Engine core proc|stack trace|cancelled$"
)
_KILLED = "a process of its engine was killed, by the system for want of memory perhaps"
_PLAIN = ("ValueError", "RuntimeError", "Exception")
