"""The data options that both commands share: what they load, and the command that scores it."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prift.errors import DataError
from prift.models import context_length, vocabulary_size
from prift.text.examples import Examples, TextOptions, Window, load_examples, load_windows
from prift.text.tokenizers import load_tokenizer


@dataclass(frozen=True)
class DataSpec:
    """Datasets and how their text becomes tokens.

    data           paths or hub names, one per --data
    weights        how often each counts per epoch; empty = once each
    tokenizer      name or folder; None = the model's own
    chat_template  a Jinja file that replaces the tokenizer's template
    text           everything else: see TextOptions
    """

    data: tuple[str, ...]
    weights: tuple[float, ...] = ()
    tokenizer: str | None = None
    chat_template: str | None = None
    text: TextOptions = field(default_factory=TextOptions)
    trust_remote_code: bool = False

    def load(self, model_folder: Path, config: Any) -> tuple[Examples, Any]:
        """(examples, tokenizer). Raises DataError, OptionError."""
        tokenizer = self.tokenizer_of(model_folder)
        return self.examples(tokenizer, config), tokenizer

    def tokenizer_of(self, model_folder: Path) -> Any:
        """The tokenizer named, or the model's own. Raises DataError."""
        return load_tokenizer(
            self.tokenizer or str(model_folder), self.chat_template, self.trust_remote_code
        )

    def examples(self, tokenizer: Any, config: Any) -> Examples:
        """The examples, checked against the model's context and vocabulary."""
        examples = load_examples(
            self.data,
            tokenizer,
            self.text,
            context=context_length(config),
            data_weights=self.weights or None,
        )
        _check_vocabulary(examples, vocabulary_size(config))
        return examples

    def windows(
        self,
        tokenizer: Any,
        config: Any,
        rows: int,
        advance: Callable[[int], None],
        owns: Callable[[Any], bool] | None = None,
    ) -> Iterator[Window]:
        """The same examples a window at a time, each window checked: see `load_windows`."""
        vocabulary = vocabulary_size(config)

        def checked(window: Window) -> Window:
            _check_vocabulary(window.examples, vocabulary)
            return window

        windows = load_windows(
            self.data,
            tokenizer,
            self.text,
            context=context_length(config),
            data_weights=self.weights or None,
            rows=rows,
            advance=advance,
            owns=owns,
        )
        return map(checked, windows)  # unlike a generator, it keeps no window that it has given

    def precompute_command(self, model: str, cache: str) -> str:
        """The command that puts these examples' statistics into the cache."""
        words = ["prift", "precompute", "--model", model]
        for i, name in enumerate(self.data):
            words += ["--data", name]
            if self.weights:
                words += ["--data-weight", f"{self.weights[i]:g}"]
        words += ["--cache", cache]
        default = TextOptions()
        options = {
            "--tokenizer": self.tokenizer,
            "--chat-template": self.chat_template,
            "--split": self.text.split,
            "--format": None if self.text.format == default.format else self.text.format,
            "--labels": None if self.text.labels == default.labels else self.text.labels,
            "--template": self.text.template,
            "--system": self.text.system,
            "--max-length": self.text.max_length,
            "--limit": self.text.limit,
            "--on-empty": None if self.text.on_empty == default.on_empty else self.text.on_empty,
        }
        for flag, value in options.items():
            if value is not None:
                words += [flag, str(value)]
        if self.trust_remote_code:
            words.append("--trust-remote-code")
        return shlex.join(words)


def _check_vocabulary(examples: Examples, vocabulary: int) -> None:
    if examples.max_id() < vocabulary:
        return
    for i, example in enumerate(examples):
        if example.input_ids.max() >= vocabulary:
            raise DataError(
                f"{examples.where(i)}: token id {example.input_ids.max()} is outside the model's "
                f"vocabulary of {vocabulary:,}. The tokenizer is not this model's: use --tokenizer."
            )
