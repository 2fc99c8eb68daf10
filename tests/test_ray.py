"""`--engine ray` on a cluster of two machines on this one: the numbers, a death, errors, Ctrl-C.

Slow, and only where Ray is installed: `make test-all`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

from prift.backends import ray_data  # noqa: E402
from prift.cache import PriorCache, list_priors  # noqa: E402
from prift.errors import ModelError, OptionError  # noqa: E402
from prift.precompute import PrecomputeOptions, precompute  # noqa: E402
from prift.stats import CORE  # noqa: E402
from tests.lab import Lab  # noqa: E402
from tests.test_precompute import stored  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """A head without a CPU and two machines with one each. Ray is told that one of these has two
    GPUs, and shares them out; torch finds none, so workers run on the CPU all the same."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=1, num_gpus=0)
    cluster.add_node(num_cpus=1, num_gpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def run(lab: Lab, **options) -> tuple[object, list[str]]:
    said = []
    options = PrecomputeOptions(engine="ray", **options)
    return precompute(lab.model, lab.spec(), lab.cache, options, said.append), said


class Mortal(ray_data.RayWorker):
    """One of the workers is killed in the middle of its first share."""

    def __init__(self, job):
        super().__init__(job)
        self._inner, self._scorer = self._scorer, self
        self._mark = Path(job.model).with_name("killed")

    def score(self, *asked):
        for i, row in enumerate(self._inner.score(*asked)):
            if i == 2 and self._first():
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    def _first(self) -> bool:
        try:
            os.close(os.open(self._mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def test_one_of_two_workers_is_killed_and_the_cache_is_whole(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_data, "RayWorker", Mortal)
    lab, alone = Lab(tmp_path, rows=200), Lab(tmp_path / "alone", rows=200)
    result, said = run(lab, ray_gpus=0)
    assert (tmp_path / "killed").exists()
    assert any("a Ray worker died on" in line for line in said)
    assert result.scored == result.sequences == alone.precompute().scored
    found, expected = stored(lab), stored(alone)
    (identity,) = list_priors(lab.cache).values()
    assert len(PriorCache(lab.cache, identity)) == result.sequences  # no row twice
    assert [identity] == list(list_priors(alone.cache).values())
    for name in ("logprob", "log_mass_rank", "entropy"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    assert sorted(found) == sorted(CORE)
    assert run(lab, ray_gpus=0)[0].scored == 0
    assert lab.precompute().scored == 0


def test_errors_are_those_of_the_local_engine_and_keep_what_was_scored(cluster, tmp_path):
    """One token's embedding is NaN; one example alone has it."""
    lab = Lab(tmp_path, rows=60)
    weights = safetensors.torch.load_file(Path(lab.model, "model.safetensors"))
    weights["model.embed_tokens.weight"][500] = float("nan")
    safetensors.torch.save_file(weights, Path(lab.model, "model.safetensors"), {"format": "pt"})
    rows = [{"input_ids": [1] * n, "labels": [-100] + [1] * (n - 1)} for n in range(2, 50)]
    rows[40] = {"input_ids": [1, 500, 2], "labels": [-100, 500, 2]}
    Path(lab.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError, match=r"data.jsonl:41: the model's logits for token 1 are NaN"):
        run(lab, batch_tokens=1)
    (identity,) = list_priors(lab.cache).values()
    kept = len(PriorCache(lab.cache, identity))
    assert 0 < kept < 48  # of the broken share the longer ones; other shares as far as they came
    rows.pop(40)
    Path(lab.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, _ = run(lab)
    assert (result.sequences, result.scored) == (47, 47 - kept)


def test_a_cluster_without_the_devices_is_named(cluster, tmp_path):
    lab = Lab(tmp_path, rows=2)
    with pytest.raises(OptionError, match="no machine of the Ray cluster has 3 GPUs"):
        run(lab, ray_gpus=3)


@pytest.mark.parametrize(
    ("workers", "gpus", "size", "each"),
    [
        (None, None, 2, (1, None)),  # one for each GPU
        (1, None, 1, (1, None)),
        (None, 2, 1, (2, None)),
        (None, 0, 2, (0, 1)),  # one for each machine
        (1, 0, 1, (0, 1)),
        (9, 0, 2, (0, 1)),
    ],
)
def test_a_worker_for_each_device(cluster, workers, gpus, size, each):
    pool = ray_data._pool(workers, gpus)
    assert (pool.size, (pool.gpus, pool.cpus)) == (size, each)


INTERRUPTED = """
import os
import prift_cli
from prift.store.writer import CacheWriter
add, rows = CacheWriter.add, []
def interrupted_behind_the_fifth(self, *row):
    add(self, *row)
    rows.append(row)
    if len(rows) == 5:
        os.kill(os.getpid(), {number})
CacheWriter.add = interrupted_behind_the_fifth
prift_cli.main()
"""


def command(lab: Lab, cache: Path, program: str) -> subprocess.CompletedProcess:
    """On a Ray of its own, which it begins and ends."""
    words = ["precompute", "--model", lab.model, "--data", lab.data, "--cache", cache]
    words += ["--engine", "ray", "--ray-workers", "2", "--json"]
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "local"},
        timeout=400,
    )


def test_a_signal_keeps_what_was_scored_and_the_command_continues(tmp_path):
    """--json alone is on stdout. SIGTERM too, for which Ray has a handler of its own."""
    lab = Lab(tmp_path, rows=60)
    for number in (signal.SIGTERM, signal.SIGINT):
        cache = tmp_path / f"cache{number}"
        stopped = command(lab, cache, INTERRUPTED.format(number=int(number)))
        assert stopped.returncode == 128 + number, stopped.stderr
        assert "The same command goes on from there" in stopped.stderr
        assert "Traceback" not in stopped.stderr and stopped.stdout == ""
        (identity,) = list_priors(cache).values()
        assert 5 <= (kept := len(PriorCache(cache, identity))) <= 60
    done = command(lab, cache, "import prift_cli; prift_cli.main()")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["scored"] == result["sequences"] - kept
    assert len(PriorCache(cache, identity)) == result["sequences"]
