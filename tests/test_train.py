"""Command 2: what it needs, what it leaves, and that it is a model of its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file

from prift.errors import MissingPrior, OptionError
from prift.identity import config_digest, weights_digest
from prift.models import weight_files
from tests.lab import Lab

FLAGS = "--max_steps 4 --learning_rate 1e-3 --per_device_train_batch_size 4"


def test_the_result_is_an_ordinary_checkpoint(lab):
    lab.train("ordinary", "prift-prob", FLAGS)
    output = lab.root / "ordinary"
    model = tf.AutoModelForCausalLM.from_pretrained(output)
    tokenizer = tf.AutoTokenizer.from_pretrained(output)
    ids = tokenizer("the car", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert type(model).__name__ == "LlamaForCausalLM"
    names = {p.name for p in output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "prift.yaml"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    assert yaml.safe_load((output / "prift.yaml").read_text())["method"] == "prift-prob"
    trained, before = (
        load_file(output / "model.safetensors"),
        load_file(Path(lab.model) / "model.safetensors"),
    )
    assert any(not torch.equal(trained[n], before[n]) for n in trained)


def test_no_prior_model_is_needed(lab, tmp_path):
    """The prior's folder is gone: a copy of the model trains from the cache alone."""
    own = Lab(tmp_path)
    own.precompute()
    shutil.copytree(own.model, tmp_path / "copy")
    shutil.rmtree(own.model)
    own.train("out", "prift-mass", FLAGS, model=str(tmp_path / "copy"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_another_model_reads_the_prior_by_id_or_by_folder(lab, tmp_path):
    other = Lab(tmp_path, seed=1)
    (prior_id,) = (p.name for p in Path(lab.cache).iterdir())
    spec = lab.spec()
    assert spec.data
    for number, prior in enumerate((prior_id, lab.model)):
        lab.train(f"other{number}", "prift-prob", FLAGS, model=other.model, prior=prior)
        logged = lab.history(f"other{number}")[0]
        assert abs(logged["drift"]) > 1e-3  # another model: it disagrees with the prior


def test_a_trainee_with_more_embeddings_is_fine(lab, tmp_path):
    grown = tf.AutoModelForCausalLM.from_pretrained(lab.model)
    grown.resize_token_embeddings(600)
    grown.save_pretrained(tmp_path)
    tf.AutoTokenizer.from_pretrained(lab.model).save_pretrained(tmp_path)
    lab.train("grown", "prift-mass", FLAGS, model=str(tmp_path), prior=lab.model)
    assert tf.AutoConfig.from_pretrained(lab.root / "grown").vocab_size == 600


def test_sft_and_dft_need_no_cache(lab):
    for method in ("sft", "dft"):
        lab.train(f"bare-{method}", method, FLAGS, cache=None)
        logged = lab.history(f"bare-{method}")[0]
        assert "nll" in logged and "drift" not in logged


def test_sft_without_its_rows_says_that_drift_is_not_measured(lab, tmp_path):
    own = Lab(tmp_path)
    own.precompute(text={"limit": 3})
    said = []
    own.train("out", "sft", FLAGS, said=said)
    assert any("drift is not measured: 37 of 40 sequences have no prior" in line for line in said)


def test_missing_rows_name_the_command_that_adds_them(lab, tmp_path):
    own = Lab(tmp_path)
    own.precompute(text={"limit": 30})
    with pytest.raises(MissingPrior) as error:
        own.train("out", "prift-mass", FLAGS)
    message = str(error.value)
    assert "10 of 40 sequences have no prior" in message and "data.jsonl:31" in message
    assert f"prift precompute --model {own.model} --data {own.data}" in message
    assert not (tmp_path / "out").exists()


def test_lora_trains_an_adapter_and_merges_it(lab):
    pytest.importorskip("peft")
    lab.train("adapter", "prift-mass", FLAGS, lora_r=4)
    names = {p.name for p in (lab.root / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    tensors = load_file(lab.root / "adapter" / "adapter_model.safetensors")
    assert any(t.abs().sum() > 0 for n, t in tensors.items() if "lora_B" in n)
    lab.train("merged", "prift-mass", FLAGS, lora_r=4, merge=True)
    merged = tf.AutoModelForCausalLM.from_pretrained(lab.root / "merged")
    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(lab.root / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_lora_starts_at_the_prior(lab):
    """Adapters start as the identity, so the first drift is zero."""
    lab.train("lora-start", "prift-prob", FLAGS, lora_r=2)
    assert abs(lab.history("lora-start")[0]["drift"]) < 1e-5


def test_resume_ends_where_an_uninterrupted_run_ends(lab):
    flags = "--max_steps 6 --learning_rate 1e-3 --per_device_train_batch_size 4 "
    lab.train("straight", "prift-mass", flags + "--save_strategy steps --save_steps 3")
    lab.train("halted", "prift-mass", flags + "--save_strategy steps --save_steps 3")
    for path in (lab.root / "halted").iterdir():
        if path.name != "checkpoint-3":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lab.train("halted", "prift-mass", flags + "--save_strategy steps --save_steps 3", resume=True)
    straight = load_file(lab.root / "straight" / "model.safetensors")
    halted = load_file(lab.root / "halted" / "model.safetensors")
    assert all(torch.equal(straight[n], halted[n]) for n in straight)


def test_an_output_that_is_in_use_is_refused(lab, tmp_path):
    (lab.root / "used").mkdir()
    (lab.root / "used" / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="is not empty"):
        lab.train("used", "sft", FLAGS)
    with pytest.raises(OptionError, match="holds no .*checkpoint"):
        lab.train("used", "sft", FLAGS, resume=True)


def test_the_best_model_by_nll_is_the_one_that_leaves(lab):
    flags = (
        "--max_steps 6 --learning_rate 0.05 --per_device_train_batch_size 4 --eval_strategy steps "
        "--eval_steps 2 --save_strategy steps --save_steps 2 --load_best_model_at_end true"
    )
    lab.train("best", "sft", flags, eval_data=(lab.data,))
    state = json.loads((lab.root / "best" / "trainer_state.json").read_text())
    nlls = {e["step"]: e["eval_nll"] for e in state["log_history"] if "eval_nll" in e}
    best = min(nlls, key=nlls.get)
    assert state["best_metric"] == pytest.approx(nlls[best])
    kept = load_file(lab.root / "best" / f"checkpoint-{best}" / "model.safetensors")
    final = load_file(lab.root / "best" / "model.safetensors")
    assert all(torch.equal(kept[n], final[n]) for n in kept)


def test_the_prior_is_chosen_by_content(lab):
    (identity,) = (json.loads(p.read_text()) for p in Path(lab.cache).glob("*/prior.json"))
    assert identity["weights"] == weights_digest(weight_files(Path(lab.model)))
    assert identity["config"] == config_digest(tf.AutoConfig.from_pretrained(lab.model))


def test_bfloat16_autocast_trains_near_float32(lab):
    lab.train("amp", "prift-mass", FLAGS + " --bf16 true --use_cpu true")
    lab.train("full", "prift-mass", FLAGS)
    losses = [[e["loss"] for e in lab.history(n) if "loss" in e] for n in ("amp", "full")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)
    assert (
        load_file(lab.root / "amp" / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    )


def test_gradient_checkpointing_changes_nothing(lab):
    lab.train("checkpointed", "prift-mass", FLAGS + " --gradient_checkpointing true")
    lab.train("stored", "prift-mass", FLAGS)
    a, b = (load_file(lab.root / n / "model.safetensors") for n in ("checkpointed", "stored"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_resuming_another_run_is_refused(lab):
    flags = FLAGS + " --save_strategy steps --save_steps 2"
    lab.train("mass-run", "prift-mass", flags)
    with pytest.raises(OptionError, match="was started with method 'prift-mass', not 'sft'"):
        lab.train("mass-run", "sft", flags, resume=True)
    kept = yaml.safe_load((lab.root / "mass-run" / "prift.yaml").read_text())
    assert kept["method"] == "prift-mass"


def test_the_suggested_command_names_the_prior_being_read(tmp_path):
    """Its dtype, and the trainee's tokenizer where the prior is another model."""
    lab = Lab(tmp_path)
    lab.precompute(text={"limit": 30}, dtype="bfloat16")
    with pytest.raises(MissingPrior, match="--max-length 60 --dtype bfloat16"):
        lab.train("out", "prift-mass", FLAGS)
    other = Lab(tmp_path / "other", seed=1)
    with pytest.raises(MissingPrior) as error:
        lab.train("out", "prift-mass", FLAGS, model=other.model, prior=lab.model)
    assert f"--model {lab.model}" in str(error.value)
    assert f"--tokenizer {other.model}" in str(error.value)


def test_a_token_that_the_prior_excludes_spoils_no_metric(lab, tmp_path):
    """logprob -inf: weight 0 under prob and mass, and left out of drift."""
    from prift.forward import LabelTokens, Weighted
    from prift.metrics import SUMS, per_token, ratios

    out = {"nll": torch.tensor([1.0, 2.0]), "weights": torch.tensor([1.0, 1.0])}
    place = torch.arange(2)
    prior = {"logprob": torch.tensor([-0.5, -torch.inf])}
    weighted = Weighted(LabelTokens(place, place, place), prior, every_nll=True)
    sums = per_token(out, weighted).sum(0).tolist()
    found = ratios(dict(zip(SUMS, sums, strict=True)))
    assert found["drift"] == found["drift_kept"] == pytest.approx(-0.5)
    assert found["nll"] == pytest.approx(1.5)


def test_an_adapter_on_the_embedding_is_refused(lab):
    pytest.importorskip("peft")
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(OptionError, match=f"--lora-target {target} puts an adapter on the"):
            lab.train("embedded", "sft", FLAGS, lora_r=2, lora_target=target)


def test_evaluation_takes_its_own_split(lab, tmp_path):
    """--split picks from --data alone; --eval-split from --eval-data."""
    folder = tmp_path / "both"
    folder.mkdir()
    rows = Path(lab.data).read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:30]))
    (folder / "test.jsonl").write_text("".join(rows[30:]))
    said = []
    own = Lab(tmp_path / "own")
    own.data = str(folder)
    own.train(
        "split", "sft", FLAGS, text={"split": "train"}, said=said, cache=None,
        eval_data=(str(folder),), eval_split="test",
    )  # fmt: skip
    assert any(line.startswith("training: 30 rows") for line in said)
    assert any(line.startswith("evaluation: 10 rows") for line in said)
