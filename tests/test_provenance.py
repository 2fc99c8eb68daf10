"""What a part says of itself explains its numbers, and gives nobody away."""

import base64
import getpass
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prift.precompute import PrecomputeOptions, precompute
from prift.provenance import last_name, printable, provenance, provenance_in
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from prift.text.tokenizers import load_tokenizer, template_digest, tokenizer_digest
from tests import cache_fixtures as fx
from tests.cache_fixtures import runs
from tests.lab import Lab

HF_TOKEN = "hf_" + "QwErTyUiOp" * 3
SECRET = "planted-secret-value-1234"
PROMPT = "You are a discreet assistant of the Example Corporation."


def bytes_of(path: Path) -> bytes:
    """Everything a reader can see: the file, and the Arrow schema that is in it as base64."""
    schema = pq.read_metadata(path).metadata[b"ARROW:schema"]
    return path.read_bytes() + base64.b64decode(schema)


def test_a_whole_part_holds_no_secret_no_path_and_no_text(tmp_path, monkeypatch):
    home = tmp_path / "homes" / "some-user"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "some-login")
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert Path.home() == home and getpass.getuser() == "some-login"
    lab = Lab(home, rows=4)
    rows = Path(lab.data).read_text()
    folder = home / "some-login"  # data that are named after the user
    folder.mkdir()
    Path(lab.data).rename(folder / "rows.jsonl")
    monkeypatch.chdir(folder)
    spec = DataSpec(data=(".", str(folder)))
    result = precompute(
        lab.model, spec, f"{home}/caches/some-login", PrecomputeOptions(), lambda line: None
    )
    (part,) = Path(result.folder, "parts").glob("*.parquet")
    found = bytes_of(part)
    assert b'"model": "model"' in found  # what is looked for below would be found
    for word in ("some-user", "some-login", "homes", str(tmp_path), HF_TOKEN, SECRET):
        assert word.encode() not in found, word
    for word in json.loads(rows.splitlines()[0]).values():
        assert word.encode() not in found
    (said,) = provenance_in(part)
    assert said["data"] == ["***", "***"]


def facts(lab, model: str | None = None, folder: Path | None = None, **options) -> dict:
    """The provenance of a run over odd data, with further options."""
    spec = DataSpec(
        data=(
            f"https://user:{SECRET}@example.com/data/rows.jsonl?token={SECRET}",
            "s3://bucket/deep/rows.parquet",
            "team/dataset:config",
            "/home/somebody/rows.json",
        ),
        text=TextOptions(system=PROMPT, max_length=7, split="train"),
    )
    folder = folder or Path(lab.model)
    tokenizer = load_tokenizer(lab.model)
    text = provenance(model or lab.model, folder, tokenizer, spec, "cpu", options)["prift"]
    assert SECRET not in text and "somebody" not in text and PROMPT not in text
    return json.loads(text)


def test_it_names_what_the_numbers_came_from(lab):
    found = facts(lab, positions="all")
    tokenizer = load_tokenizer(lab.model)
    assert found["tokenizer"] == tokenizer_digest(tokenizer)
    assert found["template"] == template_digest(tokenizer)
    assert found["data"] == ["rows.jsonl", "rows.parquet", "team/dataset:config", "rows.json"]
    assert (found["positions"], found["max_length"], found["split"]) == ("all", 7, "train")
    assert found["system_prompt"] == "given"
    assert found["model"] == "model" and found["revision"] is None
    assert {"prift", "torch", "transformers"} <= set(found["packages"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", found["date"])


def test_a_snapshot_of_the_hub_is_named_by_repository_and_revision(lab, tmp_path):
    snapshot = tmp_path / "models--team--model-1.5B" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(lab.model)  # resolved, it is a folder like any other
    assert facts(lab, folder=snapshot)["model"] == "model"
    snapshot.unlink()
    snapshot.mkdir()
    for model in ("team/model-1.5B", str(snapshot)):
        found = facts(lab, model, snapshot)
        assert (found["model"], found["revision"]) == ("team/model-1.5B", "0123abcd")


def test_credentials_in_any_option_are_taken_out(lab, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "no-known-shape-of-key")
    found = facts(
        lab,
        url=f"s3://me:{SECRET}@store/x?endpoint=y&secret_key={SECRET}&scheme=http",
        words=["fine", f"use {HF_TOKEN} here", "no-known-shape-of-key"],
        deep={"cache": "/home/somebody/cache/x", "plain": 3, "ratio": "1/2"},
    )
    assert found["url"] == "s3://***@store/x?endpoint=y&secret_key=***&scheme=http"
    assert found["words"] == ["fine", "use *** here", "***"]
    assert found["deep"] == {"cache": "x", "plain": 3, "ratio": "1/2"}


def test_a_part_merged_of_several_names_them_all(tmp_path):
    both = [{"model": "a"}, {"model": "b"}]
    metadata = {"prift": json.dumps([*both, 3])}
    path = fx.forge(tmp_path, fx.table().replace_schema_metadata(metadata))
    assert provenance_in(path) == both


@pytest.mark.parametrize("text", [None, "{", "[1]", "[" * 9999, '{"model": 1}' + " " * (2 << 20)])
def test_what_others_wrote_is_read_as_data_or_not_at_all(tmp_path, text):
    metadata = {} if text is None else {"prift": text}
    path = fx.forge(tmp_path, fx.table().replace_schema_metadata(metadata))
    assert provenance_in(path) == []
    assert isinstance(pq.read_table(path), pa.Table)


def test_a_file_that_is_no_part_says_nothing(tmp_path):
    assert provenance_in(fx.place(tmp_path, b"no Parquet")) == provenance_in(tmp_path / "no") == []
    path = fx.add(tmp_path / "whole", [("one", 2, runs(1, 2), [1])])
    path.write_bytes(path.read_bytes()[:-9])
    assert provenance_in(path) == []


def test_printable():
    assert printable("Qwen/Qwen2.5\u20111.5B é") == "Qwen/Qwen2.5\u20111.5B é"
    assert printable("a\x1b[31m\nb\r\u202ec") == "a?[31m?b??c"
    assert printable("x" * 100) == "x" * 77 + "..."


def test_last_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert last_name("squad") == "squad"
    assert last_name("team/set") == "team/set"  # no folder here: a hub's name
    (tmp_path / "team" / "set").mkdir(parents=True)
    assert last_name("team/set") == "set"
    assert last_name(".") == tmp_path.name
    assert last_name("hf://datasets/team/set@main/x.jsonl") == "x.jsonl"
