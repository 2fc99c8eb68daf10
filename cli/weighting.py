"""The options that say how tokens are weighed, shared by the commands that weigh them."""

from collections.abc import Callable
from typing import Any

import click

from prift.errors import OptionError

from .command import key_values
from .options import cache_root, data_options

# As in prift.presets, which is not imported for --help.
PRESET_NAMES = ["prift-code-prob", "prift-code-mass", "trl-dft", "llamafactory-dft"]
PRESET_NAMES += ["llamafactory-eaft", "ms-swift-dft", "axolotl-eaft"]

_OPTIONS = [
    click.option(
        "--method",
        type=click.Choice(["sft", "dft", "prift-prob", "prift-mass"]),
        help="A rule and its source by the name papers use.",
    ),
    click.option(
        "--preset",
        type=click.Choice(PRESET_NAMES),
        help="Rule, source, options and normaliser of another program's step (docs/methods.md).",
    ),
    click.option(
        "--rule",
        metavar="R",
        help="Weighting rule (docs/methods.md); A*B multiplies two; PACKAGE.MODULE:FUNCTION is "
        "your own.",
    ),
    click.option(
        "--source",
        type=click.Choice(["prior", "online"]),
        help="Whose statistics the rule sees: the frozen prior's, or the model's in training.",
    ),
    click.option(
        "--rule-arg", multiple=True, metavar="K=V", help="Option of the rule, as threshold=0.5."
    ),
    click.option(
        "--ties",
        type=click.Choice(["paper", "official-code"]),
        help="How mass counts tokens exactly as likely as the target.  [default: paper]",
    ),
    click.option(
        "--mix",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        metavar="S",
        help="Share of plain SFT: the weight becomes (1 - S) w + S.",
    ),
    click.option("--min-weight", type=float, metavar="W", help="No weight is below this."),
    click.option("--max-weight", type=float, metavar="W", help="No weight is above this."),
    click.option("--allow-negative", is_flag=True, help="Rules may give negative weights."),
    click.option(
        "--allow-import",
        is_flag=True,
        help="A config file may name a rule of your own, which runs.",
    ),
]
_NAMES = (
    "method",
    "preset",
    "rule",
    "source",
    "rule_arg",
    "ties",
    "mix",
    "min_weight",
    "max_weight",
)
_NAMES += ("allow_negative", "allow_import")


def weighting_options(function: Callable) -> Callable:
    """--method, --rule and what belongs to them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def prior_weights(function: Callable) -> Callable:
    """The options of a command that weighs data by what a prior thought of them, and trains
    nothing: which model's tokens and prior, which data, which cache, which rule."""
    model = click.option(
        "--model",
        required=True,
        metavar="M",
        help="Model to be trained: its tokenizer makes the ids, and its prior is read.",
    )
    prior = click.option(
        "--prior",
        metavar="MODEL|ID",
        help="Which prior of the cache to read.  [default: the only one of --model]",
    )
    for option in (prior, weighting_options, cache_root, data_options, model):
        function = option(function)
    return function


def prior_weigher(ctx: click.Context, options: dict[str, Any]) -> Any:
    """chosen_weigher, where a rule's source is the prior unless said otherwise."""
    if options["rule"] and options["source"] is None and not options["preset"]:
        options["source"] = "prior"
    return chosen_weigher(ctx, options)


def chosen_weigher(ctx: click.Context, options: dict[str, Any]) -> Any:
    """The Weigher that these options name; takes them out of `options`, and puts in the normaliser
    where a preset says which. Raises OptionError."""
    given = {name: options.pop(name) for name in _NAMES}
    method, rule, source = given["method"], given["rule"], given["source"]
    if given["preset"]:
        return _of_preset(ctx, given, options)
    if (method is None) == (rule is None) or (method and source):
        raise OptionError(
            "choose one of --method NAME, or --rule NAME with --source prior|online, or --preset "
            "NAME."
        )
    if rule:
        refuse_code_of_file(ctx, "rule", rule, given["allow_import"])
    arguments = _arguments(given)

    from prift.methods import METHODS, weigher

    if method:
        rule, source = METHODS[method]
    return weigher(
        rule,
        source,
        arguments,
        mix=given["mix"],
        least=given["min_weight"],
        most=given["max_weight"],
        allow_negative=given["allow_negative"],
    )


def _arguments(given: dict[str, Any]) -> dict[str, str]:
    """--rule-arg, and --ties, which is short for one. Raises OptionError."""
    arguments = key_values(given["rule_arg"], "--rule-arg")
    if given["ties"] and "ties" in arguments:
        raise OptionError("--ties and --rule-arg ties= say the same thing: give one of them.")
    if given["ties"]:
        arguments["ties"] = given["ties"]
    return arguments


def _of_preset(ctx: click.Context, given: dict[str, Any], options: dict[str, Any]) -> Any:
    """The preset's Weigher; its normaliser is put into `options` and the context, so that what is
    written of a run says it. Raises OptionError for options that contradict it."""
    from prift.methods import weigher
    from prift.presets import preset

    names = ("method", "rule", "source", "mix", "min_weight", "max_weight")
    beside = {name: given[name] for name in names} | {"rule_arg": _arguments(given)}
    beside |= {name: options[name] for name in ("normalize", "anchor") if _said(ctx, name)}
    found = preset(given["preset"], beside)
    if "normalize" in options:
        options["normalize"] = ctx.params["normalize"] = found.normalize
    return weigher(found.rule, found.source, found.arguments)


def _said(ctx: click.Context, name: str) -> bool:
    """Whether an option of the command was given, here or in a config file."""
    return name in ctx.params and ctx.get_parameter_source(name) not in (
        None,
        click.core.ParameterSource.DEFAULT,
    )


def refuse_code_of_file(ctx: click.Context, option: str, rule: str, allowed: bool) -> None:
    """Raises OptionError for a rule by import path that a config file names in this option."""
    from_file = ctx.get_parameter_source(option) is click.core.ParameterSource.DEFAULT_MAP
    if ":" in rule and from_file and not allowed:
        raise OptionError(
            f"the config file names the rule {rule}, which is code that would run. Where you trust "
            "it, add --allow-import."
        )
