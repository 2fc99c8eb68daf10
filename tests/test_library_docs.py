"""docs/library.md: all its code runs, and its TRL trainer takes the step that the formula gives."""

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf

from tests import cli_fixtures as cli

DOCS = Path(__file__).parent.parent / "docs" / "library.md"
MODEL = "Qwen/Qwen2.5-1.5B"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's commands and code, run from top to bottom in a folder with a tiny model in place
    of the one it names: what the code defined, what it printed, the folder."""
    folder = tmp_path_factory.mktemp("library")
    cli.make_model(folder / "model", max_position_embeddings=512)
    answers = ["clips", "clips a day", "no clip, and no car that goes fast"]
    rows = [{"prompt": f"How many {n}?", "completion": f" {answers[n % 3]}"} for n in range(12)]
    cli.write_rows(folder / "train.jsonl", rows)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", DOCS.read_text(), re.M | re.S)
    names, said = {}, io.StringIO()
    with patch.context(), redirect_stdout(said):
        for kind, code in blocks:
            code = code.replace(MODEL, "model")
            if kind == "bash":
                words = shlex.split(code.replace("\\\n", " "))
                assert words[0] == "prift"
                cli.succeeded(cli.prift(*words[1:]))
            else:
                code = code.replace('SFTConfig("out-trl"', 'SFTConfig("out-trl", use_cpu=True')
                exec(compile(code, str(DOCS), "exec"), names)
    yield SimpleNamespace(names=names, said=said.getvalue(), folder=folder, blocks=blocks)
    patch.undo()


def test_the_page_runs(page):
    assert [kind for kind, _ in page.blocks].count("python") == 6
    assert "12 rows" in page.said and "not scored" in page.said
    assert page.names["trainer"].state.global_step > 0


def test_the_page_names_the_columns_that_are_written(page):
    for name in pq.read_schema(page.folder / "weighted.parquet").names:
        assert f"| `{name}` |" in DOCS.read_text()


def test_the_loss_of_the_loop_is_the_formula(page):
    rows = page.names["rows"].select(range(4))
    model = tf.AutoModelForCausalLM.from_pretrained(page.folder / "model")
    naive = naive_loss(model, rows)
    assert page.names["loss"].item() == pytest.approx(naive.item(), rel=1e-5)


def naive_loss(model, rows) -> torch.Tensor:
    """The weighted loss written out, each sequence alone."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logp = model(ids[None]).logits[0].double().log_softmax(1)
        for t, (label, weight) in enumerate(zip(row["labels"], row["weights"], strict=True)):
            if label != -100:
                assert label == ids[t]
                total, count = total - weight * logp[t - 1, label], count + 1
    return total / count


@pytest.mark.parametrize(("packing", "size"), [(True, 2), (False, 4)])
def test_a_step_of_the_trl_trainer_is_the_step_of_the_formula(page, packing, size):
    """All rows in one step of plain gradient descent: parameters move by the gradient."""
    from trl import SFTConfig

    rows = datasets.load_dataset(
        "parquet",
        data_files=str(page.folder / "weighted.parquet"),
        split="train",
        cache_dir=str(page.folder / "datasets"),
    )
    assert {w for row in rows for w in row["weights"]} == {0.0, 1.0}
    generator = torch.Generator().manual_seed(0)
    rows = rows.map(  # weights that tell every token from every other
        lambda row: {
            "weights": [
                float(torch.rand((), generator=generator)) if label != -100 else 0.0
                for label in row["labels"]
            ]
        },
        new_fingerprint=f"told-apart-{packing}",
    )
    arguments = SFTConfig(
        str(page.folder / f"out-{packing}"),
        packing=packing,
        max_length=max(map(len, rows["input_ids"])) if packing else None,
        per_device_train_batch_size=size,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        weight_decay=0.0,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
    )
    trainer = page.names["WeightedSFTTrainer"](
        model=str(page.folder / "model"), args=arguments, train_dataset=rows
    )
    packed = trainer.train_dataset
    assert ("seq_lengths" in packed.column_names) == packing
    assert not packing or 1 < len(packed) < len(rows)  # several sequences a row, several rows
    trainer.args.gradient_accumulation_steps = -(-len(packed) // size)  # all in one step
    before = {n: p.detach().double().clone() for n, p in trainer.model.named_parameters()}
    naive = tf.AutoModelForCausalLM.from_pretrained(page.folder / "model", dtype=torch.float64)
    loss = naive_loss(naive, rows)
    loss.backward()
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss.item(), rel=1e-5)
    gradients = dict(naive.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        moved = before[name] - parameter.detach().double()
        wanted = gradients[name].grad
        scale = wanted.abs().max() + before[name].abs().max() * 1e-2
        assert (moved - wanted).abs().max() <= 2e-5 * scale, name
        assert wanted.abs().max() > 0 or name.endswith("bias")
