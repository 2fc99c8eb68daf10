"""Which prior of a cache answers: the one asked for, or an error that shows both sides."""

import json
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from prift.backends.vllm_options import VLLMOptions, identify
from prift.cache import PriorCache, sequence_key
from prift.choice import Asked, choose_prior, command_for, open_prior
from prift.errors import CacheError, ModelError
from prift.identity import PriorIdentity, canonical_json
from prift.models import load_config
from prift.store import versions
from prift.store.writer import CacheWriter
from prift.text.dataspec import DataSpec
from prift_cli.precompute import precompute
from prift_cli.vllm import engine_arguments
from tests import cache_fixtures as fx
from tests.cache_fixtures import IDENTITY, OTHER, runs
from tests.cli_fixtures import make_model

RUN = "prift precompute ..."


def priors(root, *identities: PriorIdentity, model: str | None = None) -> Path:
    """A cache with these priors; with `model`, each has a part of one row that names it."""
    for identity in identities:
        facts = {"prift": json.dumps({"model": model})}
        with CacheWriter(root, identity, facts) as writer:
            if model:
                ids = np.array([5, 6, 7], np.int32)
                writer.add(sequence_key(ids), 3, runs(1, 3), fx.stats([2, 4]))
    return root


def asked(identity=IDENTITY) -> Asked:
    return Asked("some/model", identity.weights, identity.config)


def choose(root, prior_id=None, identity=IDENTITY, names=("logprob",)):
    return choose_prior(root, names, RUN, prior_id, lambda: asked(identity))


def test_the_only_prior_of_the_model_is_chosen(tmp_path):
    assert choose(priors(tmp_path, IDENTITY, OTHER)) == IDENTITY
    assert choose(tmp_path, identity=OTHER) == OTHER


def test_an_adapter_makes_another_model(tmp_path):
    adapted = replace(IDENTITY, adapter="d" * 64)
    with pytest.raises(CacheError, match="model unknown; adapter dddddddddddd, asked for none"):
        choose(priors(tmp_path, adapted))
    assert choose(priors(tmp_path, IDENTITY)) == IDENTITY
    assert choose(tmp_path, adapted.id) == adapted


def test_a_cache_without_priors_says_what_to_run(tmp_path):
    def hashed():
        raise AssertionError("the model need not be hashed to say so")

    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CacheError, match=f"{place} holds no prior. Run:\n  prift precompute"):
            choose_prior(place, (), RUN, None, hashed)


def test_several_priors_of_the_model_are_listed_with_what_differs(tmp_path):
    half, eager = replace(IDENTITY, dtype="bfloat16"), replace(IDENTITY, attention="eager")
    priors(tmp_path, IDENTITY, half, eager, OTHER)
    priors(tmp_path, half, model="Qwen/Qwen2.5-1.5B")
    with pytest.raises(CacheError) as caught:
        choose(tmp_path)
    first, *rest = str(caught.value).split("\n")
    assert first == f"{tmp_path} holds 3 priors of some/model; choose one with --prior ID:"
    lines = {
        IDENTITY.id: "model unknown; attention sdpa, dtype float32",
        half.id: "Qwen/Qwen2.5-1.5B; attention sdpa, dtype bfloat16",
        eager.id: "model unknown; attention eager, dtype float32",
    }
    assert rest == [f"  --prior {key}  ({lines[key]})" for key in sorted(lines)]


def test_a_prior_is_taken_by_its_id(tmp_path):
    priors(tmp_path, IDENTITY, replace(IDENTITY, dtype="bfloat16"), OTHER)
    assert choose(tmp_path, IDENTITY.id) == IDENTITY
    assert choose(tmp_path, OTHER.id) == OTHER  # of another model: asked for by name


def test_an_unknown_id_lists_those_there_are(tmp_path):
    priors(tmp_path, IDENTITY, OTHER, model="m")
    with pytest.raises(CacheError) as caught:
        choose(tmp_path, "0123456789abcdef")
    assert f"{tmp_path} holds no prior 0123456789abcdef. It holds:" in str(caught.value)
    assert f"--prior {IDENTITY.id}  (m; weights aaaaaaaaaaaa)" in str(caught.value)
    assert f"--prior {OTHER.id}  (m; weights cccccccccccc)" in str(caught.value)


def test_a_cache_of_other_models_shows_both_sides_and_what_to_run(tmp_path):
    config = replace(IDENTITY, config="e" * 64)
    priors(priors(tmp_path, OTHER, model="Qwen/Qwen2.5-0.5B"), config)
    with pytest.raises(CacheError) as caught:
        choose(tmp_path)
    lines = {
        OTHER.id: "Qwen/Qwen2.5-0.5B; weights cccccccccccc, asked for aaaaaaaaaaaa",
        config.id: "model unknown; config eeeeeeeeeeee, asked for bbbbbbbbbbbb; the weights are "
        "the same: another version of transformers, perhaps",
    }
    assert str(caught.value).split("\n") == [
        f"{tmp_path} holds no prior of some/model (weights aaaaaaaaaaaa, config bbbbbbbbbbbb). "
        "It holds:",
        *(f"  --prior {key}  ({lines[key]})" for key in sorted(lines)),
        "Choose one of them with --prior ID, or run:",
        f"  {RUN}",
    ]


def test_a_name_in_a_part_cannot_steer_the_terminal(tmp_path):
    priors(tmp_path, OTHER, model="\x1b[2Jx\nError: all is well" + "y" * 99)
    with pytest.raises(CacheError) as caught:
        choose(tmp_path)
    (line,) = (line for line in str(caught.value).split("\n") if "--prior " + OTHER.id in line)
    assert "(?[2Jx?Error: all is wellyyy" in line and "yyy...; weights" in line


@pytest.fixture
def bumped(monkeypatch):
    """A prift in which version 2 has defined `entropy` anew."""
    monkeypatch.setattr(versions, "STATS_VERSION", 2)
    monkeypatch.setattr(versions, "CHANGED", {2: frozenset({"entropy"})})
    return replace(IDENTITY, stats_version=2)


def test_the_first_version_changed_nothing():
    assert versions.changed_since(versions.STATS_VERSION) == frozenset()
    assert set(versions.CHANGED) == set(range(2, versions.STATS_VERSION + 1))


def test_older_statistics_are_read_where_their_definition_has_stayed(tmp_path, bumped):
    priors(tmp_path, IDENTITY, model="m")
    found = choose(tmp_path, names=("logprob", "rank"))
    assert found == IDENTITY
    cache = PriorCache(tmp_path, found)
    wanted = np.array([sequence_key(np.array([5, 6, 7], np.int32))], "S16"), [runs(1, 3)]
    assert cache.missing(*wanted, ["rank"]) == []
    assert cache.read(*wanted, ["rank"])["rank"].tolist() == [2, 4]
    for ask in (cache.missing, cache.read):
        with pytest.raises(CacheError, match="holds entropy as version 1 of the statistics"):
            ask(*wanted, ["rank", "entropy"])


def test_older_statistics_that_changed_are_refused_by_name(tmp_path, bumped):
    priors(tmp_path, IDENTITY)
    for prior_id in (None, IDENTITY.id):
        with pytest.raises(CacheError) as caught:
            choose(tmp_path, prior_id, names=("logprob", "entropy"))
        assert "holds entropy as version 1 of the statistics defined it" in str(caught.value)
        assert "version 2" in str(caught.value)
        assert RUN in str(caught.value) or prior_id


def test_the_newest_version_is_preferred_and_no_choice_is_asked_for(tmp_path, bumped):
    priors(tmp_path, IDENTITY, bumped)
    assert choose(tmp_path) == choose(tmp_path, names=["entropy"]) == bumped
    assert choose(tmp_path, IDENTITY.id) == IDENTITY
    priors(tmp_path, replace(bumped, dtype="bfloat16"))
    with pytest.raises(CacheError) as caught:
        choose(tmp_path)
    assert "holds 2 priors of some/model" in str(caught.value)
    assert IDENTITY.id not in str(caught.value)


def newer(root: Path, **changes) -> str:
    """A prior whose identity has these fields besides or instead; its id."""
    text = canonical_json(asdict(IDENTITY) | changes)
    prior = PriorIdentity.parse(text, "").id
    (root / prior / "parts").mkdir(parents=True)
    (root / prior / "prior.json").write_text(text)
    return prior


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stats_version": 7}, "version 7 of the statistics; this one knows up to 1"),
        ({"sampling": "top-k"}, "its identity has 'sampling', which this one does not know"),
    ],
)
def test_a_newer_prifts_prior_is_refused_and_hides_no_other(tmp_path, changes, words):
    prior = newer(tmp_path, **changes)
    for prior_id in (None, prior):
        with pytest.raises(CacheError) as caught:
            choose(tmp_path, prior_id)
        assert words in str(caught.value) and "upgrade prift" in str(caught.value)
    with pytest.raises(CacheError, match="upgrade prift"):
        PriorCache(tmp_path, PriorIdentity.parse((tmp_path / prior / "prior.json").read_text(), ""))
    assert choose(priors(tmp_path, IDENTITY)) == IDENTITY


def test_opening_the_only_prior_one_by_id_and_one_by_its_model(tmp_path, lab):
    cache = open_prior(lab.cache)
    assert len(cache) and open_prior(lab.cache, lab.model).identity == cache.identity
    assert open_prior(lab.cache, cache.identity.id).identity == cache.identity
    with pytest.raises(CacheError, match=f"holds no prior of {lab.model}"):
        open_prior(priors(tmp_path, OTHER), lab.model)
    with pytest.raises(CacheError, match="holds 2 priors; choose one with --prior ID"):
        open_prior(priors(tmp_path, IDENTITY))
    with pytest.raises(ModelError, match="no such folder"):
        open_prior(tmp_path, "./absent")


def test_the_command_to_run_repeats_no_credentials():
    options = SimpleNamespace(model="m", prior=None, cache="s3://me:secret@team/cache?region=eu")
    command = command_for(options, DataSpec(data=("d.jsonl",)), None, Path(), None)
    assert (
        command == "prift precompute --model m --data d.jsonl --cache 's3://team/cache?region=eu'"
    )


def test_the_command_that_adds_to_a_prior_of_vllm_asks_vllm_for_the_same(tmp_path):
    folder = Path(make_model(tmp_path / "m"))
    config = load_config(folder)
    asked = VLLMOptions(
        quantization="fp8",
        engine_args={"kv_cache_dtype": "fp8", "attention_backend": "FLASHINFER"},
    )
    identity = identify(folder, config, asked, dtype="bfloat16", logits_dtype="bfloat16")
    options = SimpleNamespace(model=str(folder), prior=None, cache="c")
    words = shlex.split(command_for(options, DataSpec(data=("d.jsonl",)), identity, folder, config))
    given = precompute.make_context("precompute", words[2:]).params
    again = VLLMOptions(
        quantization=given["quantization"], engine_args=engine_arguments(given["engine_arg"])
    )
    how = {name: given[name] for name in ("dtype", "logits_dtype")}
    assert given["backend"] == "vllm"
    assert identify(folder, config, again, **how) == identity


def test_a_malformed_prior_stops_nobody_and_is_named_where_nothing_fits(tmp_path):
    priors(tmp_path, IDENTITY)
    (tmp_path / OTHER.id).mkdir()
    file = tmp_path / OTHER.id / "prior.json"
    file.write_text("{")
    assert choose(tmp_path) == choose(tmp_path, IDENTITY.id) == IDENTITY
    for chosen in ({"identity": OTHER}, {"prior_id": OTHER.id}, {"prior_id": "0123456789abcdef"}):
        with pytest.raises(CacheError, match=f"{file} is not a prior's identity"):
            choose(tmp_path, **chosen)
    shutil.rmtree(tmp_path / IDENTITY.id)
    with pytest.raises(CacheError, match=rf"(?s)holds no prior\. Run.*over: {file} is not"):
        choose(tmp_path)
