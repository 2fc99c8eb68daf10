"""TrainingArguments from what follows `--` on the command line and from a config's `training:`.

prift redeclares none of transformers' flags. It sets a few defaults, and refuses by name the few
flags that would contradict the weighted loss.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from prift.errors import OptionError

_REFUSED = {
    "output_dir": "it is prift's own --output",
    "label_smoothing_factor": "smoothing would replace the weighted loss",
    "use_liger_kernel": "it would replace the model's forward, where the weighted loss runs",
    "remove_unused_columns": "prift decides which columns reach the model",
}


def training_arguments(
    output: str,
    config: Mapping[str, Any],
    flags: Sequence[str],
    has_eval_data: bool,
    resume: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """(TrainingArguments, what the user set: a mapping fit for a config's `training:`).

    config  the config file's `training:` mapping; flags override it
    Raises OptionError for unknown, refused or malformed flags.
    """
    from transformers import TrainingArguments

    given = {**_check_config(config), **_parse(flags)}
    for name, reason in _REFUSED.items():
        if name in given:
            raise OptionError(f"training argument {name} is not yours to set: {reason}.")
    if given.get("average_tokens_across_devices", True) is False:
        raise OptionError(
            "average_tokens_across_devices=false is refused: prift divides by the label tokens of "
            "the whole optimiser step, all devices together."
        )
    if has_eval_data is False and given.get("load_best_model_at_end"):
        raise OptionError("load_best_model_at_end needs --eval-data.")
    values = {**_defaults(given, has_eval_data), **given}
    try:
        return TrainingArguments(output_dir=output, remove_unused_columns=False, **values), given
    except (ValueError, TypeError, ImportError) as error:
        raise OptionError(f"training arguments: {error}") from error


def _defaults(given: Mapping[str, Any], has_eval_data: bool) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "train_sampling_strategy": "group_by_length",  # random batches pad half as much again
        "logging_steps": 10,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    if has_eval_data:
        defaults["eval_strategy"] = given.get("save_strategy", "epoch")
        if given.get("load_best_model_at_end"):
            defaults["save_strategy"] = given.get("eval_strategy", defaults["eval_strategy"])
            defaults["metric_for_best_model"] = "nll"
            defaults["greater_is_better"] = False
    return defaults


def _known() -> dict[str, Any]:
    import dataclasses

    from transformers import TrainingArguments

    return {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}


def _check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    known = _known()
    for name in config:
        if name not in known:
            raise OptionError(f"config, training: {name!r} is not a TrainingArguments field.")
    return dict(config)


def _parse(flags: Sequence[str]) -> dict[str, Any]:
    """The fields that the flags name, with parsed values."""
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise OptionError(f"after --: {message}")

    parser = Parser(TrainingArguments, allow_abbrev=False)
    space, rest = parser.parse_known_args(list(flags))
    if rest:
        raise OptionError(
            f"after --: {rest[0]!r} is not a flag of transformers.TrainingArguments, or has no "
            "such value."
        )
    named = {f.split("=")[0].lstrip("-").replace("-", "_") for f in flags if f.startswith("--")}
    named |= {n.removeprefix("no_") for n in named if n not in _known()}
    return {n: _plain(getattr(space, n)) for n in named if n in _known()}


def _plain(value: Any) -> Any:
    """Enum members as their values: what a YAML file can hold."""
    value = getattr(value, "value", value)
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value
