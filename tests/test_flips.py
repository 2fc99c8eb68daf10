"""One flipped bit anywhere in a part: `train` stops before it uses a row of it, `verify` finds it,
and of a remote cache's copies nobody notices: they are downloaded anew."""

import shutil

import numpy as np
import pytest

from prift.store.remote import open_root
from prift.store.verify import verify
from tests import cli_fixtures as cli


@pytest.fixture(scope="module")
def scored(model, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("flips") / "cache"
    cli.succeeded(cli.precompute(model, data, root))
    return root


def flips(file, number, footer=True):
    """Flips one bit after the other, in bytes spread over the file, with or without its footer; it
    is whole again after."""
    whole = file.read_bytes()
    size = len(whole) - (0 if footer else 8 + int.from_bytes(whole[-8:-4], "little"))
    for n, at in enumerate(np.linspace(0, size - 1, number).astype(int).tolist()):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << n % 8
        file.write_bytes(flipped)
        yield at
    file.write_bytes(whole)


def part(root):
    (found,) = root.rglob("*.parquet")
    return found


def train(model, data, out, root):
    return cli.train(model, data, out, "--method", "prift-mass", "--cache", root)


def test_train_uses_no_row_of_it(scored, model, data, tmp_path):
    for at in flips(part(scored), 9):
        said = cli.refused(train(model, data, tmp_path / "out", scored))
        assert f"{part(scored).name} is damaged" in said or "have no prior" in said, (at, said)
        assert not list(tmp_path.rglob("*.safetensors"))
    cli.succeeded(train(model, data, tmp_path / "out", scored))


def test_verify_finds_it(scored):
    root = open_root(scored)
    priors = root.priors()
    assert verify(root, priors).problems == []
    for _ in flips(part(scored), 200):
        (problem,) = verify(root, priors).problems
        assert "does not match the hash in its name" in problem.what
        assert part(scored).name in problem.where


def test_train_finds_it_in_a_store(scored, s3, model, data, tmp_path, monkeypatch):
    for file in scored.rglob("*"):
        if file.is_file():
            s3.put(f"cache/{file.relative_to(scored)}", file.read_bytes())
    name = next(n for n in s3.objects() if n.endswith(".parquet"))
    local = tmp_path / "flipped"
    local.write_bytes(s3.get(name))
    for at in flips(local, 3):
        s3.put(name, local.read_bytes())
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine{at}"))
        said = cli.refused(train(model, data, tmp_path / "out", s3.url()))
        assert f"s3://{s3.name}/{name} is damaged" in said
    s3.put(name, local.read_bytes())
    cli.succeeded(train(model, data, tmp_path / "out", s3.url()))
    copy = part(tmp_path / f"machine{at}")  # a footer may hide a column: then a row is missing
    for number, _ in enumerate(flips(copy, 4, footer=False)):
        out = tmp_path / f"out{number}"
        cli.succeeded(train(model, data, out, s3.url()))
        shutil.rmtree(out)
