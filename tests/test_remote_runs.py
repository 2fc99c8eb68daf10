"""The main job on a cache in an object store, from two machines."""

import shlex

import pytest

from prift.store import stores
from tests import cli_fixtures as cli

SECRET = "wJalrXUtnFEMI-K7MDENG"


def cache_files(bucket):
    return {name: size for name, size in bucket.objects().items() if name.startswith("cache/")}


@pytest.fixture
def cached(s3, model, data):
    cli.succeeded(cli.precompute(model, data, s3.url()))
    return s3


def test_scored_on_one_machine_and_trained_on_another(s3, model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    url = s3.url()
    said = cli.succeeded(cli.precompute(model, data, url))
    before = cache_files(s3)
    assert len(before) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    s3.server.requests.clear()
    said += cli.succeeded(cli.precompute(model, data, url))
    assert "6 in the cache, 0 to score" in said
    out = tmp_path / "out"
    said += cli.succeeded(cli.train(model, data, out, "--method", "prift-mass", "--cache", url))
    assert not [path for method, path in s3.server.requests if method == "PUT"]
    assert cache_files(s3) == before
    assert SECRET not in said
    everywhere = [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()]
    assert not any(SECRET.encode() in content for content in everywhere)


def test_what_is_missing_is_named_with_the_command_that_adds_it(cached, model, data, tmp_path):
    more = cli.write_rows(tmp_path / "more.jsonl", [{"prompt": "a", "completion": " b"}])
    url = cached.url()
    result = cli.train(model, more, tmp_path / "out", "--method", "prift-mass", "--cache", url)
    said = cli.refused(result, "1 of 1 sequences have no prior", f"s3://{cached.name}/cache")
    command = next(line for line in said.splitlines() if "prift precompute" in line)
    assert "1 to score" in cli.succeeded(cli.prift(*shlex.split(command)[1:]))


def test_credentials_in_a_url_go_nowhere(s3, model, data, tmp_path):
    """Not even where a run could do without the cache."""
    url = s3.url(user=f"AKIAEXAMPLE:{SECRET}@")
    result = cli.train(model, data, tmp_path / "out", "--method", "sft", "--cache", url)
    assert SECRET not in cli.refused(result, "leave credentials out of the URL")
    assert SECRET not in cli.refused(cli.precompute(model, data, url), "leave credentials out")
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and SECRET in f.read_text("latin-1")]


def test_a_store_that_fails_for_good_in_the_middle(s3, model, data, monkeypatch):
    monkeypatch.setattr(stores, "_PAUSES", (0.01,) * 5)
    s3.server.fail(503, "PUT", "/parts/", times=float("inf"))
    said = cli.refused(cli.precompute(model, data, s3.url()), "does not answer", "6 tries")
    assert "run the same command again" in said
    assert list(cache_files(s3)) == [name for name in cache_files(s3) if "prior.json" in name]
    s3.server.faults.clear()
    cli.succeeded(cli.precompute(model, data, s3.url()))
