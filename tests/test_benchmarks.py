"""What the benchmarks claim of stage 1, with room for a noisy machine."""

import pytest
import torch

from benchmarks import scale, weigh
from benchmarks.measure import interleaved
from benchmarks.score import memory, operands
from benchmarks.variants import runner
from tests.cli_fixtures import make_model

V = 151_936


def test_statistics_need_little_memory_at_a_large_vocabulary():
    assert memory("prift", V, "float32") < 64


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["prift", "prift-eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_need_little_memory_however_they_are_computed(variant, dtype):
    assert memory(variant, V, dtype) < 64


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1.08), ("bfloat16", 1.25)])
def test_statistics_cost_little_more_than_the_projection(dtype, most):
    given = operands(V, dtype)
    runs = {name: runner(name, *given) for name in ("projection", "prift")}
    assert torch.get_num_threads() == 1
    seconds = interleaved(runs, 7)
    assert seconds["prift"] <= most * seconds["projection"]


@pytest.mark.slow
def test_time_is_linear_and_memory_flat():
    small, large = scale.measure([5_000, 30_000])
    rates = [r["scored_tokens"] / r["seconds"] for r in (small, large)]
    assert rates[1] > 0.7 * rates[0]
    assert large["second_mib"] <= 1.1 * large["first_mib"]
    assert large["second_mib"] <= 1.3 * small["second_mib"] + 64


@pytest.mark.slow
def test_looking_before_training_takes_seconds_and_little_memory(tmp_path):
    make_model(tmp_path / "model", max_position_embeddings=2048)
    small, large = (weigh.measure(tmp_path, rows, 1) for rows in (100, 10_100))
    assert (small["examples"], large["examples"], large["rules"]) == (100, 10_100, 3)
    assert large["seconds"] - small["seconds"] < 10
    assert large["mib"] - small["mib"] < 128
