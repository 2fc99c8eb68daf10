"""What is asked of a step before it is taken: that it has weight, and that nothing is broken."""

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from prift.errors import ModelError, PriftError
from prift.methods import METHODS, weigher
from prift.watch import StepGuard
from prift.weigher import RULES, rule
from tests import rule_references
from tests.test_wherever import FLAGS

STEPS, PEAK, DECAY = 12, 1e-3, 0.1
ONE_BY_ONE = (
    f"--max_steps {STEPS} --learning_rate {PEAK} --weight_decay {DECAY} "
    "--per_device_train_batch_size 1 --train_sampling_strategy sequential "
    "--lr_scheduler_type linear --max_grad_norm 0"
)
THRESHOLD = 0.8


def weights_of(lab, count: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, places of the label tokens, their weights by the naive definition) of each example."""
    examples, _ = lab.spec().load(lab.model, tf.AutoConfig.from_pretrained(lab.model))
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    found = []
    for example in (examples[i] for i in range(count)):
        ids, places = example.input_ids.astype(np.int64), np.flatnonzero(example.label_mask)
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None]).logits[0].double().numpy()
        q = rule_references.softmax(logits)
        weights = [rule_references.weight_mass(q[p - 1], ids[p], THRESHOLD) for p in places]
        found.append((ids, places, np.array(weights)))
    return found


def by_hand(lab, steps: list) -> dict[str, torch.Tensor]:
    """The parameters after these steps, one example each; those without weight only move the
    schedule on."""
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK)
    for number, (ids, places, weights) in enumerate(steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK * (1 - number / len(steps))
        if not weights.any():
            continue
        logits = model(torch.from_numpy(ids)[None]).logits[0, places - 1]
        target = torch.from_numpy(ids[places])
        nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        optimiser.zero_grad()
        (nll @ torch.from_numpy(weights).float() / len(places)).backward()
        optimiser.step()
    return dict(model.named_parameters())


def test_a_step_without_weight_is_skipped_and_counted(lab):
    """No decay and no momentum, but the schedule goes on; equal to a loop written by hand."""
    steps = weights_of(lab, STEPS)
    without = [not w.any() for *_, w in steps]
    assert 3 <= sum(without) <= 9 and not without[0]  # so that there is momentum to be kept still
    said = []
    trained = lab.train(
        "skips", "prift-mass", ONE_BY_ONE, rule_args={"threshold": str(THRESHOLD)}, said=said
    )
    assert (trained.steps, trained.skipped) == (STEPS, sum(without))
    assert trained.metrics["skipped_steps"] == sum(without)
    assert f"{sum(without)} of {STEPS} steps had no weight and were skipped" in said
    found, expected = load_file(lab.root / "skips" / "model.safetensors"), by_hand(lab, steps)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-5)
    rates = [e["learning_rate"] for e in lab.history("skips") if "learning_rate" in e]
    np.testing.assert_allclose(rates, [PEAK * (1 - n / STEPS) for n in range(STEPS)], rtol=1e-6)


def test_the_count_goes_through_a_checkpoint(lab):
    flags = f"{ONE_BY_ONE} --save_strategy steps --save_steps 1"
    options = {"rule_args": {"threshold": str(THRESHOLD)}}
    whole = lab.train("counts", "prift-mass", flags, **options)
    (lab.root / "counts" / f"checkpoint-{STEPS}" / "trainer_state.json").unlink()
    resumed = lab.train("counts", "prift-mass", flags, resume=True, **options)
    assert resumed.skipped == whole.skipped > 1


@pytest.mark.parametrize("method", ["sft", "prift-prob"])
def test_a_run_without_any_weight_leaves_the_model_as_it_was(lab, method):
    """Every weight rounds to 0; sft has none to round, and moves."""
    power = {} if method == "sft" else {"power": "1e30"}
    trained = lab.train(f"nothing-{method}", method, FLAGS, rule_args=power)
    before = load_file(f"{lab.model}/model.safetensors")
    after = load_file(lab.root / f"nothing-{method}" / "model.safetensors")
    assert all(torch.equal(after[n], before[n]) for n in before) == bool(power)
    assert trained.skipped == (4 if power else 0)


@pytest.fixture
def bad_rule():
    """Registers a rule that gives its value to the share of tokens that the prior found hardest, or
    to the one that it found hardest of all."""
    names = []

    def register(
        name: str, value: float, source: str, signed: bool = False, share: float = 0.0
    ) -> str:
        def weights(stats):
            hard = stats.logprob <= stats.logprob.quantile(share)
            return torch.where(hard, value, 1.0)

        RULES[name] = rule(name, needs=("logprob",), signed=signed)(weights).rule
        METHODS[name] = (name, source)
        names.append(name)
        return name

    yield register
    for name in names:
        del RULES[name], METHODS[name]


@pytest.mark.parametrize("source", ["prior", "online"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2.0])
def test_a_weight_that_may_not_be_names_rule_token_and_value(lab, bad_rule, value, source):
    name = bad_rule(f"bad{value}", value, source, share=0.5)
    early = source == "prior"  # found before any step
    with pytest.raises(PriftError, match="rule bad" if early else "step 1: rule bad") as error:
        lab.train(f"{name}-{source}", name, FLAGS, rule_args=None)
    message = str(error.value)
    assert f"rule {name} weighs token " in message and f" {value}; wanted finite, 0" in message
    place = message.split(" of ", 1)[1].split()[0]
    row = int(place.removeprefix("data.jsonl:"))
    assert 1 <= row <= (40 if early else 8)  # of the first two micro-batches
    assert early or "There is no checkpoint" in message


def test_the_token_that_is_named_is_the_one(lab, bad_rule):
    """The hardest token of all the data, by the prior's own logits."""
    examples, _ = lab.spec().load(lab.model, tf.AutoConfig.from_pretrained(lab.model))
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    every = []
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        with torch.no_grad():
            log = model(ids[None]).logits[0].double().log_softmax(-1)
        places = np.flatnonzero(example.label_mask).tolist()
        every += [(float(log[p - 1, ids[p]]), row, p) for p in places]
    _, row, place = min(every)
    name = bad_rule("one", float("nan"), "prior")
    flags = "--num_train_epochs 1 --learning_rate 1e-5 --per_device_train_batch_size 40"
    with pytest.raises(PriftError, match=f"weighs token {place} of data.jsonl:{row + 1} nan"):
        lab.train("one", name, flags)


def test_negative_weights_of_a_rule_that_may(lab, bad_rule):
    trained = lab.train("signed", bad_rule("signed", -2.0, "prior", signed=True), FLAGS)
    assert trained.metrics["mean_weight"] < 1


def test_absurd_weights_show_in_the_mean(lab, bad_rule):
    trained = lab.train("absurd", bad_rule("absurd", 1e6, "prior"), FLAGS)
    assert trained.metrics["mean_weight"] > 1e4


def test_a_loss_that_diverges_names_step_and_checkpoint(lab):
    """Found at the step itself, whenever it would be logged; the step is not taken."""
    flags = "--max_steps 9 --learning_rate 1e30 --per_device_train_batch_size 4 --logging_steps 9"
    with pytest.raises(ModelError, match="(loss|gradient norm) is (NaN|infinite) at step 2,") as e:
        lab.train("diverges", "sft", flags + " --save_strategy steps --save_steps 1")
    last = lab.root / "diverges" / "checkpoint-1"
    assert f"The last checkpoint is {last}: --resume" in str(e.value)
    assert "lower --learning_rate" in str(e.value)
    with pytest.raises(ModelError, match="There is no checkpoint in .*diverges-too"):
        lab.train("diverges-too", "sft", flags)


def guarded(guard: StepGuard, tmp_path, model: torch.nn.Module) -> None:
    """The guard is asked as Trainer asks it."""
    arguments = tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    guard.on_pre_optimizer_step(arguments, tf.TrainerState(), tf.TrainerControl(), model=model)


def test_an_infinite_gradient(tmp_path):
    guard, model = StepGuard(weigher("uniform", None, {})), torch.nn.Linear(2, 2)
    one = torch.ones(())
    guard.see(one, torch.ones(3), str)
    guard.see_norm(torch.tensor(2.0))
    guarded(guard, tmp_path, model)
    guard.see(one, torch.ones(3), str)
    guard.see_norm(torch.tensor(torch.inf))
    with pytest.raises(ModelError, match="the gradient norm is infinite at step 1"):
        guarded(guard, tmp_path, model)
    guard.scales_loss = True  # float16: the scaler passes over such a step by itself
    guard.see(one, torch.ones(3), str)
    guarded(guard, tmp_path, model)
    assert guard.skipped == 0
