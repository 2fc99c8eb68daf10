"""Rules that ask whose words a token is, in whole runs, against the definition in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from prift.errors import MissingPrior
from prift.methods import weigher
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from prift.training_data import TrainOptions, load_data
from tests import cli_fixtures as cli
from tests import rule_references
from tests.lab import Lab

ROWS, RATE = 6, 0.05
ARGUMENTS = {"prompt": 0.25, "response": 2.0}
WORDS = ("--rule-arg", "prompt=0.25", "--rule-arg", "response=2", "--labels", "all")
FLAGS = ("--max_steps", "1", "--optim", "sgd", "--learning_rate", str(RATE), "--max_grad_norm", "0")
FLAGS += ("--per_device_train_batch_size", str(ROWS), "--lr_scheduler_type", "constant")
FLAGS += ("--report_to", "none", "--save_strategy", "no", "--use_cpu", "true")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("lab"), rows=ROWS)
    lab.precompute(text={"labels": "all"})
    return lab


def naive(lab: Lab, rule: str, dtype) -> tuple[dict, float]:
    """(parameters after one step, mean weight): each row's text, tokenised here, with prompt and
    response told by their own ids; the model's own logits are the prior's, where it starts."""
    tokenizer = tf.AutoTokenizer.from_pretrained(lab.model)
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=dtype)
    loss, tokens = 0.0, []  # (logits, target, weight of its role)
    for line in Path(lab.data).read_text().splitlines():
        row = json.loads(line)
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "response"))
        ids = [*prompt, *response, tokenizer.eos_token_id]
        logits = model(torch.tensor([ids])).logits[0]
        for t in range(1, len(ids)):
            tokens.append(
                (logits[t - 1], ids[t], ARGUMENTS["prompt" if t < len(prompt) else "response"])
            )
    logits = torch.stack([one[0] for one in tokens]).detach().numpy()
    weights = np.array([one[2] for one in tokens])
    for factor in rule.split("*")[1:]:
        weights = weights * rule_references.weights(
            factor, logits, [one[1] for one in tokens], None
        )
    for (z, target, _), weight in zip(tokens, weights, strict=True):
        loss = loss - weight * z.log_softmax(0)[target]
    (loss / len(tokens)).backward()
    with torch.no_grad():
        found = {name: p - RATE * p.grad for name, p in model.named_parameters()}
    return {name: p.detach().double() for name, p in found.items()}, weights.mean()


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("wit", "prior"),
        ("wit*prob", "prior"),
        ("wit*prob", "online"),
        ("wit*deft-cayley", "online"),
    ],
)
def test_a_step_is_that_of_the_definition(lab, tmp_path, rule, source):
    """Alone, and in products from either source; of batch scope, whose weights are made apart."""
    words = ("--cache", lab.cache, "--max-length", "60", "--rule", rule, "--source", source, *WORDS)
    done = cli.train(lab.model, lab.data, tmp_path / "out", *words, "--json", "--", *FLAGS)
    cli.succeeded(done)
    metrics = json.loads(done.stdout)["metrics"]
    ours = load_file(tmp_path / "out" / "model.safetensors")
    (exact, mean), (rounded, _) = (naive(lab, rule, t) for t in (torch.float64, torch.float32))
    assert metrics["mean_weight"] == pytest.approx(mean, rel=2e-5)
    start = load_file(Path(lab.model) / "model.safetensors")
    for name, wanted in exact.items():
        moved = float((wanted - start[name].double()).norm())
        budget = 4 * float((rounded[name] - wanted).norm()) + 1e-6 * moved
        assert float((ours[name].double() - wanted).norm()) <= budget, name
    assert any(float((w - start[n].double()).norm()) > 1e-4 for n, w in exact.items())


def test_prompts_that_were_not_scored_are_asked_for(lab, tmp_path):
    """The prior of responses alone does not do for prompts; the command that adds it is said."""
    own = Lab(tmp_path, rows=3)
    own.precompute()
    chosen = weigher("wit*prob", "prior", {})
    spec = DataSpec(data=(own.data,), text=TextOptions(max_length=60, labels="all"))
    options = TrainOptions(own.model, "out", spec, chosen, cache=own.cache)
    config = tf.AutoConfig.from_pretrained(own.model)
    with pytest.raises(MissingPrior) as error:
        load_data(options, Path(own.model), config, lambda line: None)
    command = str(error.value).splitlines()[-1].split()
    assert command[command.index("--labels") + 1] == "all"
    cli.succeeded(cli.prift(*command[1:]))
    load_data(options, Path(own.model), config, lambda line: None).close()


def test_the_same_ids_in_other_roles_have_other_weights(tmp_path):
    """Weights are kept in files that runs on one machine share, by what decides them."""
    lab = Lab(tmp_path, rows=1)
    found, config = [], tf.AutoConfig.from_pretrained(lab.model)
    for number, labels in enumerate(([-100, 6, 7, 8], [-100, -100, -100, 8])):
        data = tmp_path / f"{number}.jsonl"
        data.write_text(json.dumps({"input_ids": [5, 6, 7, 8], "labels": labels}) + "\n")
        lab.data = str(data)
        lab.precompute(text={"labels": "all"})
        chosen = weigher("wit*prob", "prior", {"prompt": "0.25"})
        options = TrainOptions(lab.model, "out", lab.spec(labels="all"), chosen, cache=lab.cache)
        found.append(load_data(options, Path(lab.model), config, lambda line: None))
    first, second = (
        [np.asarray(one.training.prior[n]) for n in ("weights", "logprob")] for one in found
    )
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_allclose(first[0], np.exp(first[1]), rtol=1e-6)
    np.testing.assert_allclose(second[0], np.exp(first[1]) * [0.25, 0.25, 1], rtol=1e-6)
    for one in found:
        one.close()


def test_prompts_without_weight_are_not_run(tmp_path):
    """Roles alone say which tokens those are; of a row that ends in one, the end is cut off."""
    lab = Lab(tmp_path, rows=1)
    rows = [([5, 6, 7, 8], [-100, 6, -100, -100]), ([5, 6], [-100, -100]), ([5, 9], [-100, 9])]
    Path(lab.data).write_text(
        "".join(json.dumps({"input_ids": i, "labels": x}) + "\n" for i, x in rows)
    )
    chosen, config = weigher("wit", None, {}), tf.AutoConfig.from_pretrained(lab.model)
    options = TrainOptions(lab.model, "out", lab.spec(labels="all"), chosen, normalize="kept")
    found = load_data(options, Path(lab.model), config, lambda line: None).training
    items = [found[i] for i in range(len(found))]
    assert options.skips_rows and found.weighed and found.lengths.tolist() == [1, 0, 1]
    assert [item["weights"].tolist() for item in items] == [[1], [], [1]]
    assert [item["denominator"] for item in items] == [1, 0, 1]
    assert found.whole(0)["weights"].tolist() == [1, 0, 0]


def test_plain_training_is_weighed_without_memory(tmp_path):
    lab = Lab(tmp_path, rows=2)
    config = tf.AutoConfig.from_pretrained(lab.model)
    options = TrainOptions(lab.model, "out", lab.spec(), weigher("uniform", None, {}))
    found = load_data(options, Path(lab.model), config, lambda line: None).training
    assert not options.skips_rows and found.weighed and found._weights.strides == (0,)
    assert set(found[0]["weights"].tolist()) == {1.0}
