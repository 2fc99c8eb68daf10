"""TrainingArguments from what follows `--` on the command line and from a config's `training:`.

prift redeclares none of transformers' flags. It sets a few defaults, and refuses by name the few
flags that would contradict the weighted loss. A config's values are read as the flags' are, so
that `learning_rate: 5e-5`, which YAML takes for a string, and `save_strategy: no`, which it takes
for false, mean what they say.
"""

import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prift.errors import OptionError

_REFUSED = {
    "output_dir": "it is prift's own --output",
    "resume_from_checkpoint": "it is prift's own --resume",
    "label_smoothing_factor": "smoothing would replace the weighted loss",
    "use_liger_kernel": "it would replace the model's forward, where the weighted loss runs",
    "remove_unused_columns": "prift decides which columns reach the model",
    "label_names": "prift decides which columns reach the model",
    "prediction_loss_only": "evaluation without it measures nll and drift at no cost",
    "batch_eval_metrics": "evaluation sums nll and drift over the whole set by itself",
    "eval_do_concat_batches": "evaluation sums nll and drift over the whole set by itself",
    "auto_find_batch_size": "it would begin again with weights that were trained already; lower "
    "per_device_train_batch_size and raise gradient_accumulation_steps, for the same steps",
    "enable_jit_checkpoint": "prift saves a checkpoint on SIGTERM and Ctrl-C as it is",
    "parallelism_config": "context, sequence and tensor parallelism cut up what the loss needs "
    "whole; torchrun (data parallel) and --fsdp are there",
}
_SECRET = ("hub_token",)


def training_arguments(
    output: str, config: Mapping[str, Any], flags: Sequence[str], has_eval_data: bool
) -> tuple[Any, dict[str, Any]]:
    """(TrainingArguments, what the user set: a mapping fit for a config's `training:`).

    config  the config file's `training:` mapping; flags override it
    Raises OptionError for unknown, refused or malformed flags.
    """
    from transformers import TrainingArguments

    _check_environment()
    named = {_field(flag.split("=")[0]) for flag in flags if flag.startswith("--")}
    named |= {_field(str(key)) for key in config} if isinstance(config, Mapping) else set()
    for name, reason in _REFUSED.items():
        if name in named:
            raise OptionError(f"training argument {name} is not yours to set: {reason}.")
    given = {**_read_config(config), **_parse(flags, "after --: ")}
    if given.get("average_tokens_across_devices", True) is False:
        raise OptionError(
            "average_tokens_across_devices=false is refused: prift divides by the label tokens of "
            "the whole optimiser step, all devices together."
        )
    if not has_eval_data and given.get("load_best_model_at_end"):
        raise OptionError("load_best_model_at_end needs --eval-data.")
    values = {**_defaults(given, has_eval_data), **given}
    try:
        arguments = TrainingArguments(output_dir=output, remove_unused_columns=False, **values)
    except (ValueError, TypeError, ImportError) as error:
        raise OptionError(f"training arguments: {error}") from error
    if arguments.use_cpu and (arguments.fsdp or is_set("ACCELERATE_USE_FSDP")):
        raise OptionError(
            "fsdp is refused on a CPU: accelerate would make plain data parallel of it, and say "
            "nothing. Leave it out."
        )
    return arguments, {name: value for name, value in given.items() if name not in _SECRET}


def _field(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _check_environment() -> None:
    """Raises OptionError where accelerate's launcher asks for what is refused by name as a flag."""
    if is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise OptionError("ACCELERATE_USE_MEGATRON_LM is set; prift does not train with Megatron.")
    if not is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    for kind, name in [("TP", "tensor"), ("CP", "context"), ("SP", "sequence")]:
        variable = f"PARALLELISM_CONFIG_{kind}_SIZE"
        if os.environ.get(variable, "1") != "1":
            raise OptionError(
                f"{variable}={os.environ[variable]} asks for {name} parallelism, which is not "
                f"yours to set: {_REFUSED['parallelism_config']}."
            )


def is_set(variable: str) -> bool:
    """Whether an environment variable of accelerate's launcher says yes."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _defaults(given: Mapping[str, Any], has_eval_data: bool) -> dict[str, Any]:
    import torch

    defaults: dict[str, Any] = {
        "train_sampling_strategy": "group_by_length",  # random batches pad half as much again
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it would show a loss of 0 where there is none
        "log_level_replica": "error",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every parameter has a gradient, if only zero
    }
    if has_eval_data:
        defaults |= _evaluation(given)
    return defaults


def _evaluation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluates each epoch, or as often as is saved; the best model is the one of least nll."""
    by_steps = {"eval_steps", "save_steps"} & set(given) or given.get("save_strategy") == "steps"
    strategy = given.get("eval_strategy", "steps" if by_steps else "epoch")
    defaults: dict[str, Any] = {"eval_strategy": strategy}
    if strategy == "steps":
        defaults["eval_steps"] = given.get("save_steps", 500)
    best = given.get("load_best_model_at_end")
    if best:
        defaults["save_strategy"] = strategy
        defaults["save_steps"] = given.get("eval_steps", 500)
    if best or given.get("save_strategy") == "best":
        defaults["metric_for_best_model"] = "nll"
        if "metric_for_best_model" not in given:
            defaults["greater_is_better"] = False
    return defaults


def _read_config(config: Any) -> dict[str, Any]:
    """A config's `training:` mapping, its single values read as the flags' are."""
    place = "config, training: "
    if not isinstance(config, Mapping):
        raise OptionError(f"{place}found {config!r}; wanted a mapping of names to values.")
    parser, found = _parser(place), {}
    actions = {action.dest: action for action in parser._actions}
    for key, value in config.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise OptionError(
                f"{place}{key!r} is not a TrainingArguments field.{_close(name, actions)}"
            )
        if value is False and "no" in (actions[name].choices or ()):
            value = "no"
        if isinstance(value, (list, dict)) and (
            actions[name].choices or actions[name].type in (int, float)
        ):
            raise OptionError(f"{place}{name}: found {value!r}; wanted a single value.")
        if isinstance(value, (str, int, float)):
            found |= _parse([f"--{name}={value}"], place)
        elif value is not None:
            found[name] = value
    return found


def _parser(place: str) -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise OptionError(f"{place}{message}")

    return Parser(TrainingArguments, allow_abbrev=False, add_help=False)


def _parse(flags: Sequence[str], place: str) -> dict[str, Any]:
    """The fields that the flags name, with parsed values; `place` begins error messages."""
    space, rest = _parser(place).parse_known_args(list(flags))
    known = vars(space)
    if rest:
        name = rest[0].split("=")[0]
        if name.startswith("-"):
            raise OptionError(
                f"{place}{name} is not a flag of transformers.TrainingArguments."
                + _close(name.lstrip("-").replace("-", "_"), known, "--")
            )
        raise OptionError(f"{place}{rest[0]!r} is no flag, and no flag before it takes it.")
    named = {f.split("=")[0].lstrip("-").replace("-", "_") for f in flags if f.startswith("--")}
    named = {n if n in known else n.removeprefix("no_") for n in named}
    return {n: _plain(known[n]) for n in sorted(named)}


def _close(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _plain(value: Any) -> Any:
    """Enum members as their values: what a YAML file can hold."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    value = getattr(value, "value", value)
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value
