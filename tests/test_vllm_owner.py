"""An engine's processes and the process of prift that owns them: what they know of it, and that
they end with it. Without vLLM, whose part a few processes play."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prift.backends import vllm_engine


def test_an_engine_knows_of_its_owner_and_of_no_launcher(monkeypatch):
    """Processes that torchrun started have an engine each."""
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a",
                "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}  # fmt: skip
    for name, value in (launched | {"MINE": "kept", "SET": "user's"}).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with vllm_engine._started_in({"PRIFT_VLLM_OWNER": "me", "SET": "prift's"}):
        assert not launched.keys() & os.environ.keys()
        inside = [os.environ[name] for name in ("PRIFT_VLLM_OWNER", "SET", "MINE")]
    assert inside == ["me", "user's", "kept"]
    assert dict(os.environ) == before


OWNED = """
import multiprocessing, os, sys, time
context = multiprocessing.get_context("spawn")
def engine(pipe):  # started by the owner, starts the worker
    worker = context.Process(target=work, args=(pipe,))
    worker.start()
    worker.join()
def work(pipe):
    import prift.backends.vllm_worker
    pipe.send((os.getpid(), os.getppid()))
    time.sleep(60)
if __name__ == "__main__":
    from prift.store.process import signature
    owner = os.getpid()
    if sys.argv[1] == "beside":
        other = context.Process(target=time.sleep, args=(60,))
        other.start()
        owner = other.pid
    os.environ["PRIFT_VLLM_OWNER"] = signature(owner)
    here, there = context.Pipe()
    target = engine if sys.argv[1] == "engine between" else work
    context.Process(target=target, args=(there,)).start()
    print(owner, *here.recv(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["engine between", "no engine between", "beside"])
def test_what_an_engine_consists_of_ends_with_its_owner_and_nothing_else(tmp_path, how):
    """The owner is killed while the engine starts. Its worker ends itself and the engine that the
    owner started; not a process of others that started the worker, as Ray does."""
    script = tmp_path / "owner.py"
    script.write_text(OWNED)
    command = [sys.executable, str(script), how]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as started:
        owner, worker, mother = map(int, started.stdout.readline().split())
        assert (mother == owner) == (how == "no engine between")
        os.kill(owner, signal.SIGKILL)
        deadline, spared = time.monotonic() + 30, how == "beside"
        left = {worker} if spared else {worker, mother}
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = set(filter(_running, left))
        assert _running(mother) == spared
        started.kill()
    assert not left


def _running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
