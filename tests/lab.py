"""A small model, its tokenizer and some data on disk, and both commands run on them."""

import json
import random
from pathlib import Path

from prift.arguments import training_arguments
from prift.methods import METHODS, weigher
from prift.precompute import Precomputed, PrecomputeOptions, precompute
from prift.text.dataspec import DataSpec
from prift.text.examples import TextOptions
from prift.train import Trained, train
from prift.training_data import TrainOptions
from tests.families import save
from tests.toy_tokenizers import byte_level

WORDS = "the car sold clips how many times go fast did she help".split()


class Lab:
    """Everything below one folder: model/, data.jsonl, cache/."""

    def __init__(self, root: Path, family: str = "llama", rows: int = 40, seed: int = 0):
        self.root, self.model = root, str(root / "model")
        save(family, self.model, vocabulary=512, seed=seed)
        byte_level().save_pretrained(self.model)
        self.data, self.cache = str(root / "data.jsonl"), str(root / "cache")
        generator = random.Random(seed)
        lines = [
            {
                "prompt": " ".join(generator.choices(WORDS, k=generator.randint(1, 6))),
                "response": " " + " ".join(generator.choices(WORDS, k=generator.randint(1, 9))),
            }
            for _ in range(rows)
        ]
        Path(self.data).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def spec(self, **text) -> DataSpec:
        return DataSpec(data=(self.data,), text=TextOptions(**{"max_length": 60, **text}))

    def precompute(
        self, model: str | None = None, text: dict | None = None, **options
    ) -> Precomputed:
        settings = PrecomputeOptions(**options)
        return precompute(
            model or self.model, self.spec(**text or {}), self.cache, settings, lambda line: None
        )

    def train(
        self,
        name: str,
        method: str = "sft",
        flags: str = "",
        text: dict | None = None,
        rule_args: dict | None = None,
        said: list | None = None,
        **options,
    ) -> Trained:
        output = str(self.root / name)
        options = {"model": self.model, "cache": self.cache, **options}
        defaults = (
            "--report_to none --logging_steps 1 --save_strategy no --lr_scheduler_type constant"
        )
        arguments, given = training_arguments(
            output, {}, (defaults + " " + flags).split(), bool(options.get("eval_data"))
        )
        chosen = weigher(*METHODS[method], rule_args or {}, allow_negative=True)
        spec = self.spec(**text or {})
        return train(
            TrainOptions(output=output, spec=spec, weigher=chosen, **options),
            arguments,
            {"method": method, "training": given},
            (said if said is not None else []).append,
        )

    def history(self, name: str) -> list[dict]:
        """What a run logged."""
        state = json.loads((self.root / name / "trainer_state.json").read_text())
        return state["log_history"]
