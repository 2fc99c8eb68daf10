"""Presets: the step that other programs compute, as a rule, its source, options and normaliser.

Each stands for the weights and the reduction that were read in that program's code at the version
named; docs/methods.md says more of each. Optimiser, precision and order of the data are not theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prift.errors import OptionError
from prift.methods import parse
from prift.weigher import RULES


@dataclass(frozen=True)
class Preset:
    """What `--preset` stands for.

    program    whose step it is
    version    at which its code was read
    rule, source, arguments, normalize   as the options --rule, --source, --rule-arg, --normalize
    leaves     other arguments of the rule that the program has as options of its own
    """

    program: str
    version: str
    rule: str
    source: str
    normalize: str = "tokens"
    arguments: Mapping[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()


_PRIFT = ("PriFT's authors' code, wang-kee/PriFT", "9fea11e")
_LLAMA_FACTORY = ("LLaMA-Factory", "ff6d4d1")

PRESETS = {
    "prift-code-prob": Preset(*_PRIFT, "prob", "prior", "micro-batch-sum"),
    "prift-code-mass": Preset(
        *_PRIFT, "mass", "prior", "micro-batch-sum", {"ties": "official-code"}, ("threshold",)
    ),
    "trl-dft": Preset("TRL, loss_type dft", "1.16.0", "prob", "online"),
    "llamafactory-dft": Preset(*_LLAMA_FACTORY, "prob", "online"),
    "llamafactory-eaft": Preset(*_LLAMA_FACTORY, "eaft", "online", leaves=("alpha",)),
    "ms-swift-dft": Preset("ms-swift", "3602360", "prob", "online"),
    "axolotl-eaft": Preset(
        "Axolotl", "067b021", "eaft", "online", arguments={"divisor": "1"}, leaves=("alpha",)
    ),
}


def preset(name: str, given: Mapping[str, object]) -> Preset:
    """The preset of this name, its arguments joined by those given that it leaves open.

    given  option -> value of what was said beside it; None: nothing. rule_arg is a mapping

    Raises OptionError for an unknown name, and for an option that contradicts the preset.
    """
    if name not in PRESETS:
        raise OptionError(f"unknown --preset {name!r}. Presets: {', '.join(PRESETS)}.")
    found = PRESETS[name]
    fixed = {"source": found.source, "normalize": found.normalize, "mix": 0.0}
    for option, value in given.items():
        if option == "rule_arg" or value is None or value == fixed.get(option):
            continue
        says = option in ("source", "normalize")
        instead = f"is --{option} {fixed[option]}" if says else "has its own weights"
        raise OptionError(
            f"--preset {name} {instead}, so --{option.replace('_', '-')} {value} contradicts it: "
            "leave one of them out."
        )
    arguments = dict(found.arguments)
    for key, value in dict(given.get("rule_arg") or {}).items():
        option = key.removeprefix(f"{found.rule}.")
        if option in found.leaves:
            arguments[option] = value
        elif option not in arguments:
            leaves = ", ".join(found.leaves) or "none"
            raise OptionError(
                f"--preset {name} has no --rule-arg {key}={value}, as its program has no such "
                f"option. It takes: {leaves}."
            )
        elif parse(RULES[found.rule], option, value) != parse(
            RULES[found.rule], option, arguments[option]
        ):
            raise OptionError(
                f"--preset {name} is --rule-arg {option}={arguments[option]}, not "
                f"{option}={value}: leave one of them out."
            )
    return replace(found, arguments=arguments)
