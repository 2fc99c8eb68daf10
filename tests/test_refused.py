"""What prift does not train with, refused by name before anything is loaded."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers as tf

from prift.errors import OptionError
from prift.forward import Weighted, install, uninstall
from prift.methods import weigher
from tests import cli_fixtures as cli
from tests.families import tiny


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--auto_find_batch_size", ["auto_find_batch_size", "gradient_accumulation_steps"]),
        ("--parallelism_config x", ["parallelism_config", "tensor parallelism", "torchrun"]),
        ("--enable_jit_checkpoint", ["enable_jit_checkpoint", "SIGTERM"]),
        ("--fsdp", ["fsdp is refused on a CPU", "data parallel"]),
        ("--deepspeed ds.json", ["training arguments: ", "eep"]),
    ],
)
def test_training_arguments(tmp_path, flags, words):
    """Neither model nor data are there: this comes first."""
    done = cli.train("./absent", "./absent.jsonl", tmp_path / "out", "--", *flags.split())
    cli.refused(done, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, ["TP_SIZE=2", "tensor parallelism"]),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, ["CP_SIZE=2", "context parallelism"]),
        ({"PARALLELISM_CONFIG_SP_SIZE": "4"}, ["SP_SIZE=4", "sequence parallelism"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["ACCELERATE_USE_MEGATRON_LM"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["fsdp is refused on a CPU"]),
    ],
)
def test_what_accelerates_launcher_sets(monkeypatch, tmp_path, variables, words):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = cli.train("./absent", "./absent.jsonl", tmp_path / "out")
    cli.refused(done, *words)


def test_a_quantised_model(model, data, tmp_path):
    """Its weights are not even looked at."""
    folder = Path(model)
    config = json.loads((folder / "config.json").read_text())
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    (quantised / "model.safetensors").write_bytes(b"never read")
    for more in ([], ["--lora-r", "2"]):
        done = cli.train(str(quantised), "./absent.jsonl", tmp_path / "out", *more)
        cli.refused(done, "is quantised", "QLoRA", "--lora-r 16 --dtype bfloat16")


def test_nothing_of_the_patch_is_saved(lab):
    """Neither in checkpoints, which hold pickles, nor in what a whole or merged run leaves."""
    flags = "--max_steps 2 --learning_rate 1e-3 --save_strategy steps --save_steps 1 --bf16"
    lab.train("whole", "prift-mass", flags)
    lab.train("merged", "prift-mass", flags, lora_r=2, merge=True)
    ids = torch.tensor([[5, 6, 7]])
    for name in ("whole", "merged"):
        files = [p for p in (lab.root / name).rglob("*") if p.is_file()]
        assert any(p.name == "optimizer.pt" for p in files)
        for path in files:
            if path.name != "prift.yaml":
                assert b"prift." not in path.read_bytes(), path
        model = tf.AutoModelForCausalLM.from_pretrained(lab.root / name)
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_model_after_training_is_as_before(family):
    """It can be pickled and generates the same while the loss is installed, and afterwards."""
    model, ids = tiny(family), torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected, before = model.generate(ids, **settings), pickle.dumps(model)
    install(model, weigher("uniform", None, {}))
    assert torch.equal(model.generate(ids, **settings), expected)
    assert "weights" in model(input_ids=ids, weighted=Weighted.of(ids, {}))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(model)
    uninstall(model)
    assert pickle.dumps(model) == before
    assert torch.equal(model.generate(ids, **settings), expected)
    assert "weights" not in model(input_ids=ids)


def test_resuming_needs_the_optimiser(lab):
    """A checkpoint of the model alone would begin with another optimiser, and say nothing."""
    flags = "--max_steps 2 --save_strategy steps --save_steps 1 --save_only_model"
    lab.train("bare", "sft", flags)
    with pytest.raises(OptionError, match="save_only_model"):
        lab.train("bare", "sft", flags, resume=True)
