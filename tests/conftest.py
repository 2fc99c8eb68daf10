"""Shared fixtures. Nothing here is a stand-in: models are real, only small and random."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores, and their children


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, help="runs that tests/test_kill.py ends, per signal")


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory):
    """Tests never touch the user's ~/.cache/prift."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True, scope="session")
def _threads():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_inputs() -> Path:
    """Real tokenizers, data sets and a real small model, where they are at hand."""
    place = os.environ.get("PRIFT_REAL_INPUTS")
    if not place:
        pytest.skip("PRIFT_REAL_INPUTS is unset: no real inputs at hand")
    return Path(place)


@pytest.fixture(scope="session")
def stories(real_inputs):
    """The folder of a real pretrained model of 260,032 parameters."""
    return real_inputs / "models" / "stories260k"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a tiny random model with its tokenizer, for the command line's tests."""
    from tests import cli_fixtures

    return cli_fixtures.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Prompt/completion rows that fit it."""
    from tests import cli_fixtures

    return cli_fixtures.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A model, data and a cache that holds them, with both commands at hand."""
    from tests.lab import Lab

    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.precompute()
    return lab


@pytest.fixture
def s3(tmp_path):
    """An empty bucket of an S3 server on loopback: see tests/s3.py."""
    from tests import s3

    with s3.bucket(tmp_path / "copies") as bucket:
        yield bucket
