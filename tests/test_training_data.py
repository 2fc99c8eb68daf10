"""What a run reads: decoded once into files that go with it, and cut where that changes nothing."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from benchmarks.reading import BATCH, measure
from prift.cache import PriorCache
from prift.dataset import PriorDataset, collate
from prift.forward import install
from prift.methods import METHODS, weigher
from prift.request import digest, request
from prift.trainer import PriftTrainer
from prift.training_data import TrainOptions, load_data
from prift.watch import StepGuard
from tests import cutting
from tests.families import tiny
from tests.test_request import examples


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Where decoded statistics are."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / f"prift-{os.getuid()}"


def loaded(lab, method: str = "prift-mass", **config):
    """What the lab's data are for a run, by a model whose config has these values."""
    found = tf.AutoConfig.from_pretrained(lab.model)
    for name, value in config.items():
        setattr(found, name, value)
    (prior,) = (path.name for path in Path(lab.cache).iterdir())
    options = TrainOptions(
        model=lab.model, output="out", spec=lab.spec(), weigher=weigher(*METHODS[method], {}),
        cache=lab.cache, prior=prior, eval_data=(lab.data,),
    )  # fmt: skip
    return load_data(options, Path(lab.model), found, lambda line: None)


def is_cut(data: PriorDataset) -> bool:
    assert (data.lengths <= data.examples.lengths).all()
    return bool((data.lengths < data.examples.lengths).any())


def test_what_is_cut(lab, home):
    """Training data where the prior weighs; never evaluation, nor where more than a token's own
    past decides about it."""
    for method, config, cut in [
        ("prift-mass", {}, True),
        ("prift-prob", {}, True),
        ("sft", {}, False),
        ("dft", {}, False),
        ("prift-mass", {"output_router_logits": True}, False),
        ("prift-mass", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, False),
        ("prift-mass", {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, False),
    ]:
        data = loaded(lab, method, **config)
        assert is_cut(data.training) == cut, (method, config)
        assert not is_cut(data.evaluation)
        data.close()


def test_the_index_of_the_cache_does_not_stay(lab, home):
    data = loaded(lab)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is PriorCache]
    cache = PriorCache(lab.cache, data.prior)
    asked = request(data.training.examples)
    direct = cache.read(asked.keys, asked.spans, ["logprob", "log_mass_rank", "n_tie"])
    kept = (direct["log_mass_rank"] >= np.log(np.float32(0.5))).astype(np.float32)
    assert set(data.training.prior) == {"logprob", "weights"}
    assert np.array_equal(data.training.prior["logprob"], direct["logprob"])
    assert np.array_equal(data.training.prior["weights"], kept) and 0 < kept.mean() < 1
    data.close()


def test_files_are_named_by_all_that_decides_their_values():
    one = request(examples(([1, 2, 3], "011"), ([4, 5], "01")))
    found = {digest(one, ["logprob"], "0123", []), digest(one, ["logprob", "rank"], "0123", [])}
    turned = request(examples(([4, 5], "01"), ([1, 2, 3], "011")))
    found.add(digest(turned, ["logprob"], "0123", []))
    fewer = request(examples(([1, 2, 3], "001"), ([4, 5], "01")))
    found.add(digest(fewer, ["logprob"], "0123", []))
    found.add(digest(one, ["logprob"], "4567", []))
    found.add(digest(one, ["logprob"], "0123", ["a.parquet"]))
    assert len(found) == 6


def command(lab, output: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "prift", "train", "--model", lab.model, "--data", lab.data),
        *("--cache", lab.cache, "--max-length", "60", "--method", "prift-mass"),
        *("--output", str(output), "--", *flags),
    ]


def test_files_go_with_the_run_and_those_of_a_killed_run_with_the_next(lab, home, tmp_path):
    lab.train("whole", "prift-mass", "--max_steps 2")
    assert list(home.iterdir()) == []
    killed = subprocess.Popen(
        command(lab, tmp_path / "out", "--max_steps", "100000"), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "prift.yaml").exists():  # the last thing before it trains
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    (left,) = home.iterdir()
    lab.train("beside", "sft", "--max_steps 1")  # other statistics, other files
    assert list(home.iterdir()) == [left] and list(left.glob("arrays/*.npy"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list(home.iterdir()) == [left]
    lab.train("after", "sft", "--max_steps 1")
    assert list(home.iterdir()) == []


def test_workers_change_nothing(lab, home):
    flags = "--max_steps 4 --learning_rate 1e-3 --per_device_train_batch_size 4"
    for workers in (0, 2):
        more = f"{flags} --dataloader_num_workers {workers}"
        lab.train(f"workers{workers}", "prift-mass", more)
    a, b = (load_file(lab.root / f"workers{n}" / "model.safetensors") for n in (0, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert list(home.iterdir()) == []


def test_reading_costs_less_than_a_hundredth_of_a_step(home):
    found = measure(1000, 3)
    assert BATCH * found["item and batch"] < 0.01 * found["step"]
    assert list(home.iterdir()) == []


class Counting(PriorDataset):
    """Counts the items that are made."""

    made = 0

    def __getitem__(self, index: int) -> dict:
        self.made += 1
        return super().__getitem__(index)


def test_batches_are_grouped_by_the_lengths_that_are_run(tmp_path):
    chosen = weigher("mass", "prior", {})
    plain, times = cutting.dataset(chosen), 40
    rows = [(e.input_ids, "".join("01"[int(m)] for m in e.label_mask)) for e in plain.examples]
    repeated = examples(*rows, order=np.tile(np.arange(len(rows)), times))
    prior = {name: np.tile(values, times) for name, values in plain.prior.items()}
    data = Counting(repeated, prior, cut=True)
    model = tiny("llama")
    install(model, chosen)
    arguments = tf.TrainingArguments(
        str(tmp_path), train_sampling_strategy="group_by_length", per_device_train_batch_size=2,
        use_cpu=True,
    )  # fmt: skip
    trainer = PriftTrainer(
        model=model, args=arguments, data_collator=collate, train_dataset=data,
        guard=StepGuard(chosen), skips_rows=True,
    )  # fmt: skip
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(len(data))) and data.made == 0
    lengths = data.lengths[order][100:200]  # transformers sorts stretches of fifty batches
    assert (np.diff(lengths) <= 0).all() and lengths[0] > lengths[-1] == 0
