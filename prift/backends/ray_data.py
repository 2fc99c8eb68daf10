"""The prior run on a Ray cluster: many workers of Ray Data, each with the scorer of hf.py.

Where workers run, which gets what, and what becomes of the share of one that dies is Ray's. The
statistics come back here and are written here, so the machines need to share the model only.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prift.backends.ray_worker import Job, Worker, results, sequences_table
from prift.errors import ModelError, OptionError, first_line
from prift.identity import PriorIdentity
from prift.stats import CORE, TokenStats

WINDOW_ROWS = 1 << 20
"""Rows to be scored by one call: workers load the prior anew for each."""

_SHARE_TOKENS = {"cpu": 1 << 15, "gpu": 1 << 18}  # what is done again where a worker dies
_SHARES = 4  # for each worker, at least, so that none waits long for the last
_KIND = "accelerator_type:"  # begins the name of a Ray resource


def load(
    model: str,
    identity: PriorIdentity,
    *,
    workers: int | None = None,
    gpus: int | None = None,
    batch_tokens: int | None = None,
    compiled: bool | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> "RayScorer":
    """Joins the Ray cluster of RAY_ADDRESS, or the one this machine belongs to, or begins one of
    this machine alone. Ray stays connected.

    model          a folder that every machine has, or a hub name
    identity       what hf.identify made of it here
    workers, gpus  see `prift precompute --help`

    Raises OptionError where Ray is absent, or the cluster cannot hold a worker.
    """
    _connect()
    folder = Path(model).expanduser()
    pool = _pool(workers, gpus)
    job = Job(
        model=str(folder.resolve()) if folder.is_dir() else model,
        identity=identity,
        names=CORE,
        gpus=pool.gpus,
        batch_tokens=batch_tokens,
        compiled=compiled,
        trust_remote_code=trust_remote_code,
    )
    return RayScorer(job, pool, say)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Workers alike: how many, and what each takes of its machine."""

    size: int
    gpus: int
    cpus: int | None  # None: Ray's default beside a GPU
    device: str


class RayWorker(Worker):
    """The class that Ray Data makes an actor of."""

    def __init__(self, job: Job):
        import ray

        super().__init__(job, ray.get_runtime_context().was_current_actor_reconstructed)


class RayScorer:
    """A backends.Scorer. What workers say is told once."""

    def __init__(self, job: Job, pool: _Pool, say: Callable[[str], None]):
        self.identity = job.identity
        self.device_name = f"Ray, {pool.size} x {pool.device}"
        self._job, self._pool, self._say = job, pool, say
        self._told: set[str] = set()

    def score(
        self,
        sequences: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        names: Sequence[str] = CORE,
    ) -> Iterator[tuple[int, TokenStats]]:
        """See backends.Scorer. Raises ModelError too, for what befalls a worker; statistics that
        were finished before are yielded first."""
        import ray

        names = tuple(names)
        try:
            for table in self._answers(sequences, positions, names):
                for answer in results(table, names):
                    if isinstance(answer, str):
                        self._tell(answer)
                    else:
                        yield answer
        except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
            of_python = isinstance(error, ray.exceptions.RayTaskError)
            if of_python or getattr(error, "actor_init_failed", False):
                raise  # a bug, and Ray says where
            raise ModelError(
                f"Ray gave up: {first_line(error)}. What was scored is kept; once the cluster is "
                "well, run the same command again."
            ) from error

    def close(self) -> None:
        """Nothing: Ray is left by `session`."""

    def _answers(
        self, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray], names: Sequence[str]
    ) -> Iterator[Any]:
        """The workers' tables, as they come."""
        import ray

        rows, shares = self._rows(sequences), []
        for begin in range(0, len(sequences), rows):
            index = range(begin, min(begin + rows, len(sequences)))
            chosen = ([of[i] for i in index] for of in (sequences, positions))
            shares.append(ray.put(sequences_table(index, *chosen)))
        pool = self._pool
        data = ray.data.from_arrow_refs(shares).map_batches(
            RayWorker,
            fn_constructor_args=(replace(self._job, names=names),),
            batch_size=rows,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(pool.size, len(shares))),
            num_gpus=pool.gpus,
            num_cpus=pool.cpus,
        )
        data.context.enable_progress_bars = data.context.print_on_execution_start = False
        yield from data.iter_batches(batch_size=None, batch_format="pyarrow")

    def _rows(self, sequences: Sequence[np.ndarray]) -> int:
        """Sequences in a share. All have as many, since Ray joins what is less than a batch."""
        sampled = range(0, len(sequences), max(1, len(sequences) // 1000))
        mean = float(np.mean([len(sequences[i]) for i in sampled]))
        most = _SHARE_TOKENS["gpu" if self._pool.gpus else "cpu"] / max(mean, 1.0)
        fair = len(sequences) / (self._pool.size * _SHARES)
        return max(1, round(min(most, fair)))

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)


def check_installed() -> None:
    """Raises OptionError where Ray Data is absent."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"--engine ray needs Ray Data ({first_line(error)}): pip install 'prift[ray]'"
        ) from error


@contextmanager
def session() -> Iterator[None]:
    """For a command: it leaves Ray at the end, and its stdout is the result's alone. A thread of
    Ray's prints there what befalls workers; that goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            if "ray" in sys.modules:
                sys.modules["ray"].shutdown()


def _connect() -> None:
    check_installed()
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised as well
    heard = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)  # workers' lines: see Worker
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise OptionError(
            f"cannot join the Ray cluster: {first_line(error)}. `ray status` says whether it is "
            "there; RAY_ADDRESS=local begins one of this machine alone."
        ) from error
    finally:
        if heard is not None and signal.getsignal(signal.SIGTERM) is not heard:
            signal.signal(signal.SIGTERM, heard)  # Ray's own ends the process where it stands


def _pool(workers: int | None, gpus: int | None) -> _Pool:
    """One worker for each GPU of the cluster, or for each machine where there is none.

    Raises OptionError where no machine could hold one.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = [int(machine.get("GPU", 0)) for machine in machines]
    gpus = int(any(free)) if gpus is None else gpus
    if gpus:
        size = sum(n // gpus for n in free)
        kinds = {n.removeprefix(_KIND) for m in machines for n in m if n.startswith(_KIND)}
        if not size:
            raise OptionError(
                f"no machine of the Ray cluster has {gpus} GPUs (found: {free}). Choose fewer "
                "with --ray-gpus, or add machines."
            )
        return _Pool(min(size, workers or size), gpus, None, ", ".join(sorted(kinds)) or "GPU")
    cpus = [n for machine in machines if (n := int(machine.get("CPU", 0)))]
    if not cpus:
        raise OptionError("no machine of the Ray cluster has a CPU to give away.")
    size = workers or len(cpus)
    each = max(1, min(*cpus, sum(cpus) // size))
    return _Pool(min(size, sum(n // each for n in cpus)), 0, each, "CPU")
