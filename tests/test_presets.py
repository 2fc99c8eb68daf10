"""--preset: the steps of other programs, against their reductions in float64, and TRL itself."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file

from benchmarks.peers import trl_trainer
from prift.errors import OptionError
from prift.presets import PRESETS, preset
from prift_cli.weighting import PRESET_NAMES
from tests import cli_fixtures as cli
from tests import preset_references
from tests.lab import Lab

BATCH, ACCUMULATION, STEPS, RATE = 2, 3, 2, 0.5
FLAGS = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "optim": "sgd",
    "gradient_accumulation_steps": ACCUMULATION, "learning_rate": RATE, "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "use_cpu": True,
    "train_sampling_strategy": "sequential", "logging_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    """A model that is surer than random weights are, whose tokens come in pairs of equal logits,
    and rows drawn from it: so weights differ from token to token, and ties matter. The
    micro-batches of a step have 3, 12 and 24 label tokens, or 30, 9 and 5."""
    lab, generator = Lab(tmp_path_factory.mktemp("lab")), torch.Generator().manual_seed(0)
    model, lines = tf.AutoModelForCausalLM.from_pretrained(lab.model), []
    with torch.no_grad():
        model.lm_head.weight *= 6
        model.lm_head.weight[1::2] = model.lm_head.weight[::2]
        for labels in (1, 2, 5, 7, 20, 4, 11, 19, 8, 1, 2, 3):
            ids = torch.randint(20, 400, (3,), generator=generator).tolist()
            for _ in range(labels):
                q = model(torch.tensor([ids])).logits[0, -1].softmax(0)
                ids.append(int(q.multinomial(1, generator=generator)))
            lines.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    model.save_pretrained(lab.model)
    Path(lab.data).write_text("".join(json.dumps(row) + "\n" for row in lines))
    lab.precompute(text={"max_length": None})
    return lab


def rows(lab: Lab) -> list[dict]:
    return [json.loads(line) for line in Path(lab.data).read_text().splitlines()]


def train(lab: Lab, output, name: str, *words: str):
    flags = [word for key, value in FLAGS.items() for word in (f"--{key}", str(value))]
    given = ("--cache", lab.cache, "--preset", name, *words)
    return cli.train(lab.model, lab.data, output, *given, "--", *flags)


def naive(lab: Lab, name: str, dtype, logged: list | None = None) -> dict[str, torch.Tensor]:
    """Parameters after STEPS steps of plain gradient descent on that program's loss; what it logs
    is added to `logged`."""
    model, prior = (tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=dtype) for _ in "mp")
    data = [(row["input_ids"], row["labels"]) for row in rows(lab)]
    loss_of = getattr(preset_references, f"loss_{name.replace('-', '_')}")
    for step in range(STEPS):
        begins = [(step * ACCUMULATION + n) * BATCH for n in range(ACCUMULATION)]
        micro = [data[begin : begin + BATCH] for begin in begins]
        loss = loss_of(
            micro,
            lambda ids: model(torch.tensor([ids])).logits[0],
            lambda ids: prior(torch.tensor([ids])).logits[0].detach(),
        )
        loss.backward()
        if logged is not None:
            logged.append(float(preset_references.logged(name, loss.detach(), micro)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    return {n: p.detach().double() for n, p in model.named_parameters()}


def budgets(lab: Lab, exact: dict, rounded: dict) -> dict[str, float]:
    """Of each parameter's difference: what the same loop loses in float32, a few times over."""
    start = load_file(Path(lab.model) / "model.safetensors")
    moved = {n: float((p - start[n].double()).norm()) for n, p in exact.items()}
    assert max(moved.values()) > 1e-2
    return {n: 4 * float((rounded[n] - p).norm()) + 1e-6 * moved[n] for n, p in exact.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_the_steps_of_its_program(lab, tmp_path, name):
    """Several of them, over three unequal micro-batches each, and logs what it does."""
    if PRESETS[name].rule == "eaft":
        assert len(tf.AutoTokenizer.from_pretrained(lab.model)) > 20
    cli.succeeded(train(lab, tmp_path / "out", name))
    ours = load_file(tmp_path / "out" / "model.safetensors")
    logged, state = [], json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    exact, rounded = naive(lab, name, torch.float64, logged), naive(lab, name, torch.float32)
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses == pytest.approx(logged, rel=2e-5)
    for n, budget in budgets(lab, exact, rounded).items():
        assert float((ours[n].double() - exact[n]).norm()) <= budget, n


def test_no_two_reductions_are_the_same_here(lab):
    """Or a preset of the wrong one would pass: all but the three that are one formula."""
    found = {name: naive(lab, name, torch.float64) for name in PRESETS}
    alike = {"trl-dft", "llamafactory-dft", "ms-swift-dft"}
    for a in PRESETS:
        for b in PRESETS:
            apart = max(float((found[a][n] - found[b][n]).abs().max()) for n in found[a])
            assert (apart > 1e-4) == (a != b and not {a, b} <= alike), (a, b)


def test_trl_itself_takes_the_same_steps(lab, tmp_path):
    """Its SFTTrainer, with loss_type="dft", on the same rows in the same order, in float32."""
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    given = {**FLAGS, "output_dir": str(tmp_path / "trl")}
    trainer = trl_trainer("trl-dft", model, rows(lab), given)
    assert trainer.args.loss_type == "dft"
    trainer.train()
    cli.succeeded(train(lab, tmp_path / "out", "trl-dft"))
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), dict(model.named_parameters())
    exact = naive(lab, "trl-dft", torch.float64)
    for n, budget in budgets(lab, exact, naive(lab, "trl-dft", torch.float32)).items():
        their = theirs[n].detach().double()
        assert float((their - exact[n]).norm()) <= budget, n  # the reference is what TRL does
        assert float((ours[n].double() - their).norm()) <= 2 * budget, n


def test_what_is_written_of_a_run_is_a_config_of_it(lab, tmp_path):
    cli.succeeded(train(lab, tmp_path / "out", "prift-code-mass", "--rule-arg", "threshold=0.3"))
    config = tmp_path / "out" / "prift.yaml"
    written = yaml.safe_load(config.read_text())
    assert (written["preset"], written["normalize"]) == ("prift-code-mass", "micro-batch-sum")
    cli.succeeded(cli.prift("train", "--config", config, "--output", tmp_path / "again"))
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rule", "prob"), "has its own weights, so --rule prob contradicts it"),
        (("--method", "sft"), "has its own weights, so --method sft contradicts it"),
        (("--source", "online"), "is --source prior, so --source online contradicts it"),
        (("--normalize", "kept"), "is --normalize micro-batch-sum, so --normalize kept contra"),
        (("--normalize", "tokens"), "is --normalize micro-batch-sum, so --normalize tokens con"),
        (("--mix", "0.1"), "so --mix 0.1 contradicts it: leave one of them out"),
        (("--min-weight", "0.1"), "so --min-weight 0.1 contradicts it"),
        (("--max-weight", "0.5"), "so --max-weight 0.5 contradicts it"),
        (("--max-weight", "0"), "so --max-weight 0.0 contradicts it"),
        (("--min-weight", "0"), "so --min-weight 0.0 contradicts it"),
        (("--ties", "paper"), "is --rule-arg ties=official-code, not ties=paper"),
        (("--rule-arg", "ties=paper"), "is --rule-arg ties=official-code, not ties=paper"),
        (("--anchor", "k3", "--anchor-weight", "0.1"), "so --anchor k3 contradicts it"),
        (("--rule-arg", "nope=1"), "has no --rule-arg nope=1, as its program has no such option"),
    ],
)
def test_what_contradicts_a_preset_is_refused_by_name(lab, tmp_path, words, message):
    said = cli.refused(train(lab, tmp_path / "out", "prift-code-mass", *words), message)
    assert "--preset prift-code-mass" in said


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("trl-dft", "power", "2", "power=2, as its program has no such option. It takes: none."),
        ("prift-code-prob", "power", "1", "has no --rule-arg power=1"),
        ("llamafactory-eaft", "divisor", "1", "divisor=1, .* It takes: alpha."),
        ("axolotl-eaft", "divisor", "3", "is --rule-arg divisor=1, not divisor=3"),
        ("axolotl-eaft", "divisor", "x", "divisor=x is not a float"),
    ],
)
def test_arguments_that_its_program_has_not_are_refused(name, key, value, message):
    with pytest.raises(OptionError, match=message):
        preset(name, {"rule_arg": {key: value}})


def test_arguments_that_its_program_has_are_taken():
    found = preset("axolotl-eaft", {"rule_arg": {"alpha": "2", "divisor": "1.0"}, "mix": 0.0})
    assert found.arguments == {"divisor": "1", "alpha": "2"}
    found = preset("prift-code-mass", {"rule_arg": {"mass.threshold": "0.3"}})
    assert found.arguments == {"ties": "official-code", "threshold": "0.3"}


def test_what_agrees_with_a_preset_is_no_contradiction():
    given = {"source": "prior", "normalize": "micro-batch-sum"}
    given["rule_arg"] = {"ties": "official-code"}
    found = preset("prift-code-mass", {**given, "rule": None})
    assert found == PRESETS["prift-code-mass"]
    with pytest.raises(OptionError, match="unknown --preset 'nope'. Presets: prift-code-prob, "):
        preset("nope", {})


def test_a_preset_can_be_looked_at_before_training(lab):
    words = ("--model", lab.model, "--data", lab.data, "--cache", lab.cache, "--json")
    found = json.loads(cli.prift("weigh", *words, "--preset", "prift-code-mass").stdout)
    assert found["rules"][0]["arguments"] == [{"ties": "official-code"}]
    cli.refused(cli.prift("weigh", *words, "--preset", "trl-dft"), "known before training")


def test_presets_are_listed():
    assert list(PRESETS) == PRESET_NAMES
    lines = cli.succeeded(cli.prift("rules")).splitlines()
    for name, one in PRESETS.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        for text in (one.rule, one.source, one.normalize, one.program, one.version):
            assert text in line
        shown = cli.succeeded(cli.prift("rules", name))
        assert f"--preset {name} stands for" in shown and one.normalize in shown
        found = json.loads(cli.succeeded(cli.prift("rules", name, "--json")))
        assert (found["preset"], found["options"]) == (name, dict(one.arguments))
