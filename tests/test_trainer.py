"""Training against plain Trainer and against the naive loss: losses, parameters, metrics."""

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from prift.dataset import PriorDataset, collate
from prift.heads import body_of
from prift.methods import METHODS, weigher
from tests import references, rule_references
from tests.grids import labels_of, plain
from tests.lab import Lab

FLAGS = "--max_steps 20 --learning_rate 3e-3 --per_device_train_batch_size 4"


def plain_trainer(lab: Lab, output: str, accumulation: int) -> list[float]:
    """Losses of transformers.Trainer's own supervised fine-tuning on the same examples."""
    config = tf.AutoConfig.from_pretrained(lab.model)
    examples, tokenizer = lab.spec().load(lab.model, config)
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    arguments = tf.TrainingArguments(
        output_dir=output, max_steps=20, learning_rate=3e-3, per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation, logging_steps=1, save_strategy="no",
        lr_scheduler_type="constant", train_sampling_strategy="sequential",
        remove_unused_columns=False, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer = tf.Trainer(
        model=model,
        args=arguments,
        train_dataset=PriorDataset(examples, {}),
        data_collator=lambda items: plain(collate(items)),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_sft_equals_plain_trainer(lab, accumulation):
    name = f"sft{accumulation}"
    flags = f"{FLAGS} --train_sampling_strategy sequential"
    lab.train(name, "sft", f"{flags} --gradient_accumulation_steps {accumulation}")
    ours = [entry["loss"] for entry in lab.history(name) if "loss" in entry]
    theirs = plain_trainer(lab, str(lab.root / f"plain{accumulation}"), accumulation)
    assert len(ours) == 20 and ours[-1] < ours[0] * 0.8  # it learns, so equality says something
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def parameters(lab: Lab, name: str) -> dict[str, torch.Tensor]:
    return load_file(lab.root / name / "model.safetensors")


@pytest.mark.parametrize("method", ["dft", "prift-prob", "prift-mass"])
def test_accumulation_changes_nothing(lab, method):
    """Unequal micro-batches: the step divides by all its label tokens, however it is cut."""
    steps = "--max_steps 3 --learning_rate 1e-3 --train_sampling_strategy sequential"
    lab.train(f"{method}-one", method, steps + " --per_device_train_batch_size 8")
    cut = " --per_device_train_batch_size 2 --gradient_accumulation_steps 4"
    lab.train(f"{method}-cut", method, steps + cut)
    one, cut = parameters(lab, f"{method}-one"), parameters(lab, f"{method}-cut")
    for name in one:
        torch.testing.assert_close(one[name], cut[name], rtol=1e-4, atol=1e-5)


def first_batch(lab: Lab) -> tuple[dict, torch.Tensor]:
    """(the first four examples as a batch, the model's logits over it)."""
    config = tf.AutoConfig.from_pretrained(lab.model)
    examples, _ = lab.spec().load(lab.model, config)
    batch = collate([PriorDataset(examples, {})[i] for i in range(4)])
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    with torch.no_grad():
        hidden = body_of(model)(input_ids=batch["input_ids"]).last_hidden_state
        return batch, model.lm_head(hidden).double()


@pytest.mark.parametrize("method", METHODS)
def test_first_step_by_the_naive_definition(lab, method):
    """Loss and every metric of step one, from full logits; model = prior, so drift is zero."""
    flags = "--max_steps 1 --per_device_train_batch_size 4 --train_sampling_strategy sequential"
    lab.train(f"first-{method}", method, flags)
    logged = lab.history(f"first-{method}")[0]
    batch, logits = first_batch(lab)
    labels = labels_of(batch)
    weights = torch.zeros(labels.shape, dtype=torch.float64)
    rule = getattr(rule_references, "weight_" + METHODS[method][0])
    nll = []
    for b, t in (labels != -100).nonzero().tolist():
        q = rule_references.softmax(logits[b, t - 1].numpy())
        weights[b, t] = rule(q, int(labels[b, t]))
        truth = references.token_stats(logits[b, t - 1].numpy(), int(labels[b, t]))
        nll.append(-truth["logprob"])
    tokens = len(nll)
    kept = weights[labels != -100]
    expected = references.weighted_loss(logits, labels, weights, tokens)
    assert logged["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert logged["nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert logged["mean_weight"] == pytest.approx(float(kept.mean()), rel=1e-4)
    assert logged["zero_share"] == pytest.approx(float((kept == 0).double().mean()), abs=1e-9)
    ran = np.array(nll)[(kept != 0).numpy()]
    assert logged["nll_kept"] == pytest.approx(ran.mean(), rel=1e-4)
    assert abs(logged["drift"]) < 1e-5 and abs(logged["drift_kept"]) < 1e-5


def test_dft_and_prift_prob_agree_at_step_zero(lab):
    """One rule, two sources: model = prior and no dropout, so the first losses are the same."""
    losses = [lab.history(f"first-{m}")[0]["loss"] for m in ("dft", "prift-prob")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_evaluation_is_exact_whatever_the_batches(lab):
    """eval_nll and eval_drift are token means: batches of 3 and of 40 give the same numbers."""
    found = []
    for size in (3, 40):
        name = f"eval-{size}"
        flags = f"--max_steps 2 --learning_rate 1e-3 --per_device_eval_batch_size {size}"
        lab.train(
            name,
            "prift-mass",
            flags + " --eval_strategy steps --eval_steps 2",
            eval_data=(lab.data,),
        )
        found.append([e for e in lab.history(name) if "eval_nll" in e][0])
    for key in ("eval_loss", "eval_nll", "eval_drift", "eval_mean_weight", "eval_nll_kept"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5), key
    assert found[0]["eval_loss"] < found[0]["eval_nll"]


def test_full_metrics_can_be_rarer(lab):
    lab.train("rare", "prift-mass", "--max_steps 6", full_metrics_steps=3)
    logged = [entry for entry in lab.history("rare") if "loss" in entry]
    assert [("nll" in entry) for entry in logged] == [True, False, True, False, False, True]
    assert all("nll_kept" in entry for entry in logged)


def test_the_balance_loss_of_experts_is_added_unweighted(tmp_path):
    lab = Lab(tmp_path, "mixtral")
    losses = {}
    for balanced in (False, True):
        config = tf.AutoConfig.from_pretrained(lab.model)
        config.output_router_logits, config.router_aux_loss_coef = balanced, 0.5
        config.save_pretrained(lab.model)
        batch, _ = first_batch(lab)
        model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
        with torch.no_grad():
            losses[balanced] = float(model(**plain(batch)).loss)
        flags = "--max_steps 1 --per_device_train_batch_size 4 --train_sampling_strategy sequential"
        lab.train(f"balance-{balanced}", "sft", flags, cache=None)
        assert lab.history(f"balance-{balanced}")[0]["loss"] == pytest.approx(
            losses[balanced], rel=1e-4
        )
    assert losses[True] > losses[False] + 0.1


def test_micro_batches_of_experts_are_averaged_as_transformers_alone_has_them(tmp_path):
    """--normalize micro-batch: the mean of what the model itself answers to each."""
    lab = Lab(tmp_path, "mixtral")
    config = tf.AutoConfig.from_pretrained(lab.model)
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    config.save_pretrained(lab.model)
    examples, _ = lab.spec().load(lab.model, config)
    data = PriorDataset(examples, {})
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    batches = [collate([data[i], data[i + 1]]) for i in (0, 2)]
    assert batches[0]["num_labels"] != batches[1]["num_labels"]
    with torch.no_grad():
        wanted = np.mean([float(model(**plain(batch)).loss) for batch in batches])
    flags = "--max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    flags += " --train_sampling_strategy sequential"
    found = []
    for normalize in ("micro-batch", "tokens"):
        lab.train(normalize, "sft", flags, cache=None, normalize=normalize)
        found.append(lab.history(normalize)[0]["loss"])
    assert found[0] == pytest.approx(wanted, rel=1e-5)
    assert abs(found[1] - wanted) > 1e-4 * wanted


def test_weights_of_the_rule_reach_the_loss(lab):
    """A threshold that keeps everything makes prift-mass equal to sft."""
    flags = "--max_steps 3 --learning_rate 1e-3 --train_sampling_strategy sequential"
    lab.train("all", "prift-mass", flags, rule_args={"threshold": "0"})
    lab.train("sft-again", "sft", flags)
    for a, b in zip(lab.history("all")[:3], lab.history("sft-again")[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert weigher("mass", "prior", {"threshold": "0"}).factors[0].arguments == {"threshold": 0.0}
