"""What reading weights costs a training step: `python -m benchmarks.reading`.

100,000 examples: the embedded demonstrations, repeated, with statistics drawn at random in files as
`prift train` decodes them. Items are made and padded in random order, by eights. The smallest
sensible step is that of the embedded model of 1.3 M parameters on eight of its demonstrations:
forward, backward and AdamW under prift-mass. One thread, process CPU time, least of the rounds.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import interleaved, machine, resident, table, write
from prift.dataset import PriorDataset, collate
from prift.forward import LabelTokens, Weighted, install
from prift.mapped import mapped_arrays
from prift.methods import weigher
from prift.models import attention_for, load_config, load_model
from prift.text.examples import Examples, TextOptions, load_examples
from prift.text.tokenizers import load_tokenizer
from prift.weighing import weigh

DATA = Path(__file__).resolve().parents[1] / "data"
BATCH = 8
MASS = weigher("mass", "prior", {})


def drawn(examples: Examples) -> dict[str, np.ndarray]:
    """Statistics of all label tokens, a quarter of which prift-mass gives no weight."""
    random = np.random.default_rng(0)
    size = examples.num_labels
    mass = np.where(random.random(size) < 0.25, -3.0, -0.1)
    prior = {
        "logprob": -random.exponential(1, size).astype(np.float32),
        "log_mass_rank": mass.astype(np.float32),
        "n_tie": np.ones(size, np.int32),
    }
    weights = weigh(MASS, examples.label_counts, prior)
    return {"logprob": prior["logprob"], "weights": weights}


class Step:
    """A training step of the embedded model on one batch."""

    def __init__(self, data: PriorDataset):
        config = load_config(DATA / "model")
        attention = attention_for(config)
        self._model = load_model(DATA / "model", config, dtype="float32", attention=attention)
        self._model.train()
        install(self._model, MASS)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5)
        self._batch = collate([data[i] for i in range(BATCH)])

    def __call__(self) -> None:
        batch = dict(self._batch)
        known = {n: batch.pop(n) for n in ("weights", "scale")}
        weighted = Weighted(LabelTokens(**batch.pop("tokens")), batch.pop("prior"), **known)
        tokens = batch.pop("num_labels")
        del batch["index"], batch["denominator"]
        (self._model(**batch, weighted=weighted)["loss"] / tokens).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def measure(size: int, rounds: int) -> dict[str, float]:
    """Microseconds an example, and of a step; seconds and MiB of what happens once."""
    file, tokenizer = str(DATA / "demo" / "train.jsonl"), load_tokenizer(str(DATA / "model"))
    once = len(load_examples([file], tokenizer, TextOptions(), context=None))
    examples = load_examples(
        [file], tokenizer, TextOptions(), context=None, data_weights=[size / once]
    )
    held = mapped_arrays("benchmark", lambda: drawn(examples))
    before = resident("RssAnon")
    data, bare = PriorDataset(examples, held, cut=True), PriorDataset(examples, {})
    anonymous = resident("RssAnon") - before
    some = np.random.default_rng(1).permutation(size)[:4096].tolist()
    batches = [some[i : i + BATCH] for i in range(0, len(some), BATCH)]

    ends = np.cumsum(examples.label_counts)

    def slices() -> None:
        for index in some:
            for values in held.values():
                values[ends[index] - 9 : ends[index]]

    runs = {
        "statistics": slices,
        "item": lambda: [data[i] for i in some],
        "item and batch": lambda: [collate([data[i] for i in own]) for own in batches],
        "item and batch without statistics": lambda: [
            collate([bare[i] for i in own]) for own in batches
        ],
    }
    found = {name: s / len(some) * 1e6 for name, s in interleaved(runs, rounds).items()}
    opening = interleaved({"open": lambda: PriorDataset(examples, held, cut=True)}, 1)["open"]
    steps = interleaved({"step": Step(data)}, 5 * rounds)
    held.close()
    return {
        **found,
        "step": steps["step"] * 1e6,
        "open": opening / size * 1e6,
        "MiB": anonymous,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"], tempfile.tempdir = folder, None
        found = measure(options.examples, options.rounds)
    lines = []
    for name in [n for n in found if n not in ("step", "open", "MiB")]:
        share = BATCH * found[name] / found["step"]
        lines.append([name, f"{found[name]:.1f}", f"{100 * share:.2f} %"])
    table(["what", "microseconds an example", "of a step"], lines)
    print(
        f"\na step: {found['step'] / 1000:.1f} ms; once at the start: {found['open']:.1f} "
        f"microseconds an example to cut them, {found['MiB']:.0f} MiB"
    )
    write(options.json, found)


if __name__ == "__main__":
    main()
