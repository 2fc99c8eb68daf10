"""Rules in whole runs: extended statistics, an online model beside its prior, and two priors."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from prift.cache import PriorCache, list_priors
from prift.request import request
from tests import cli_fixtures as cli
from tests.lab import Lab

FLAGS = ("--", "--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-3")
FLAGS += ("--report_to", "none", "--save_strategy", "no", "--use_cpu", "true")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.precompute()
    return lab


def train(lab: Lab, output, *words: str):
    return cli.prift(
        *("train", "--model", lab.model, "--data", lab.data, "--cache", lab.cache),
        *("--max-length", "60", "--output", output, "--json", *words, *FLAGS),
    )


def metrics(result) -> dict:
    cli.succeeded(result)
    return json.loads(result.stdout)["metrics"]


def test_a_statistic_that_is_not_cached_is_named_and_can_be_added(lab, tmp_path):
    own = shutil.copytree(lab.cache, tmp_path / "cache")
    words = ("--rule", "eaft", "--source", "prior", "--cache", own)
    message = cli.refused(train(lab, tmp_path / "out", *words), "have no entropy_top20 in")
    command = message.splitlines()[-1].split()
    assert command[:2] == ["prift", "precompute"] and "--statistics extended" in message
    cli.succeeded(cli.prift(*command[1:]))
    assert 0 < metrics(train(lab, tmp_path / "out", *words))["mean_weight"] < 1


def test_the_online_model_beside_its_prior(lab, tmp_path):
    """At the first step both are one, and every ratio is 1; then they part."""
    words = ("--rule", "iw-sft", "--source", "online")
    cli.succeeded(train(lab, tmp_path / "out", *words))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    weights = [entry["mean_weight"] for entry in state["log_history"] if "mean_weight" in entry]
    assert weights[0] == pytest.approx(1, abs=1e-5) and abs(weights[-1] - 1) > 1e-4


def moved(model: str, folder) -> str:
    """Another model of the same kind: its weights moved a little."""
    shutil.copytree(model, folder)
    noise = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    weights = {n: w + 0.02 * torch.randn(w.shape, generator=noise) for n, w in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_two_priors(lab, tmp_path):
    """Token Cleaning keeps what the first prior likes better than the second, over all the data."""
    (first,) = list_priors(lab.cache)
    second = moved(lab.model, tmp_path / "second")
    words = ("--data", lab.data, "--cache", lab.cache, "--max-length", "60")
    cli.succeeded(cli.prift("precompute", "--model", second, *words))
    words = ("--rule", "token-cleaning", "--source", "prior", "--rule-arg", "keep=0.3")
    words += ("--prior", second, "--prior", lab.model, "--mix", "0.25")
    found = metrics(train(lab, tmp_path / "out", *words, "--eval-data", lab.data))

    config = tf.AutoConfig.from_pretrained(lab.model)
    examples, _ = lab.spec().load(lab.model, config)
    asked = request(examples)
    logprob = {
        key: PriorCache(lab.cache, one).read(asked.keys, asked.spans, ["logprob"])["logprob"]
        for key, one in list_priors(lab.cache).items()
    }
    base = logprob.pop(first)
    (liked,) = logprob.values()
    kept = np.sort(liked - base)[-round(0.3 * len(base)) :]
    share = (liked - base >= kept[0]).mean()
    assert found["eval_mean_weight"] == pytest.approx(0.75 * share + 0.25, abs=1e-6)
    assert found["eval_zero_share"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rule", "rho-1", "--source", "prior"), "compares two priors: name both"),
        (("--method", "prift-mass", "--prior", "A", "--prior", "B"), "does not compare two"),
        (("--rule", "prob", "--source", "prior", *("--prior", "A") * 3), "twice, not more often"),
    ],
)
def test_how_many_priors_a_rule_wants(lab, tmp_path, words, message):
    words = [lab.model if word in ("A", "B") else word for word in words]
    cli.refused(train(lab, tmp_path / "out", *words), message)


def test_a_config_file_does_not_run_code_unasked(lab, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("rule: some.module:rule\nsource: prior\n")
    words = ("--config", config)
    cli.refused(train(lab, tmp_path / "out", *words), "some.module:rule", "--allow-import")
    allowed = train(lab, tmp_path / "out", *words, "--allow-import")
    cli.refused(allowed, "cannot be imported")
    config.write_text("rule: some.module:rule\nsource: prior\nallow_import: true\n")
    cli.refused(train(lab, tmp_path / "out", *words), "unknown key 'allow_import'")
