"""Which prior of a cache answers, and what is said where none does.

Nothing is read whose identity is not the one asked for. An error shows both sides: what was asked
for, and what each prior of the cache has instead.
"""

import contextlib
import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from prift.cache import PriorCache, list_priors
from prift.errors import CacheError
from prift.identity import PriorIdentity, config_digest, weights_digest
from prift.models import attention_for, checkpoint_dtype, load_config, locate, weight_files
from prift.provenance import printable, provenance_in
from prift.store.remote import open_root
from prift.store.roots import Root
from prift.text.dataspec import DataSpec


@dataclass(frozen=True, slots=True)
class Asked:
    """The model whose statistics are wanted: its name as given, and the digests of its identity."""

    model: str
    weights: str
    config: str
    adapter: str | None = None

    def lacks(self, identity: PriorIdentity) -> dict[str, tuple[Any, Any]]:
        """Fields in which the prior is another: {field: (its value, the one asked for)}."""
        pairs = {
            n: (getattr(identity, n), getattr(self, n)) for n in ("weights", "config", "adapter")
        }
        return {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}


class Reader(Protocol):
    """A command that reads a prior: its options of these names."""

    model: str
    cache: str | None
    prior: str | None
    spec: DataSpec
    trust_remote_code: bool


def open_prior(
    root: str | Path | Root, prior: str | None = None, names: Collection[str] = ()
) -> PriorCache:
    """The statistics of one prior of a cache (a path or a URL).

    prior  its id; or the folder or hub name of its model; None: the only one there is
    names  statistics that will be read: of a prior scored anew under a newer definition of the
           statistics, the newest that still defines these as prift does

    Raises CacheError listing the priors there are, ModelError for a model that is not found.
    """
    root = root if isinstance(root, Root) else open_root(root)
    asked = None if prior is None or is_id(prior) else (lambda: _asked(prior, locate(prior)))
    words = ["prift", "precompute", "--model", "MODEL", "--data", "DATA", "--cache", root.given]
    command = shlex.join([*words, *statistics_option(names)])
    chosen = choose_prior(root, names, command, prior if is_id(prior) else None, asked)
    return PriorCache(root, chosen)


def choose_for(
    options: Reader, folder: Path, config: Any, names: Collection[str] = ()
) -> PriorIdentity:
    """The prior that --prior names, or that of the model in `folder`. Raises CacheError."""

    def asked() -> Asked:
        if options.prior is None:
            return _asked(options.model, folder, config)
        found = locate(options.prior, "--prior", options.trust_remote_code)
        return _asked(options.prior, found, load_config(found, options.trust_remote_code))

    prior_id = options.prior if is_id(options.prior) else None
    command = command_for(options, options.spec, None, folder, config, names)
    return choose_prior(options.cache or "", names, command, prior_id, asked)


def choose_prior(
    root: str | Path | Root,
    names: Collection[str],
    command: str,
    prior_id: str | None = None,
    asked: Callable[[], Asked] | None = None,
) -> PriorIdentity:
    """The prior of the cache to read these statistics of.

    prior_id  one to take by name; None: the only one of the model asked for
    asked     that model, called only where the cache holds any prior; None: any model
    command   what would put the statistics there

    Of priors that differ in the version of the statistics alone it is the newest that defines all
    of `names` as this prift does. Raises CacheError listing the priors there are, how they differ
    from what is asked for or from each other, and what to do.
    """
    root = root if isinstance(root, Root) else open_root(root)
    trouble: dict[str, CacheError] = {}
    found = list_priors(root, trouble)
    if prior_id in trouble:
        raise trouble[prior_id]
    passed = "".join(f"\nPassed over: {error}" for error in trouble.values())
    if not found:
        raise CacheError(f"{root.name} holds no prior. Run:\n  {command}{passed}")
    if prior_id is not None:
        if prior_id not in found:
            listed = _listing(root, found)
            raise CacheError(f"{root.name} holds no prior {prior_id}. It holds:\n{listed}{passed}")
        found[prior_id].check(names)
        return found[prior_id]
    wanted = asked() if asked is not None else None
    fitting = {k: v for k, v in found.items() if wanted is None or not wanted.lacks(v)}
    if not fitting:
        raise CacheError(_no_prior_of(root, found, wanted, command) + passed)
    readable = {k: v for k, v in fitting.items() if v.refusal(names) is None}
    if not readable:
        lines = [f"  {k}: {v.refusal(names)}" for k, v in fitting.items()]
        raise CacheError(
            f"{root.name} holds nothing of this prior that can be read:\n"
            + "\n".join(lines)
            + f"\nTo score the data as this prift does, run:\n  {command}"
        )
    newest: dict[PriorIdentity, PriorIdentity] = {}
    for identity in sorted(readable.values(), key=lambda v: v.stats_version):
        newest[replace(identity, stats_version=0)] = identity
    if len(newest) == 1:
        return next(iter(newest.values()))
    which = "priors" if wanted is None else f"priors of {printable(wanted.model, 300)}"
    listed = _listing(root, {v.id: v for v in sorted(newest.values(), key=lambda v: v.id)})
    raise CacheError(
        f"{root.name} holds {len(newest)} {which}; choose one with --prior ID:\n{listed}"
    )


def is_id(prior: str | None) -> bool:
    """Whether --prior names a prior by its id, and not a model."""
    return bool(re.fullmatch("[0-9a-f]{8,64}", prior or "")) and not Path(prior or "").exists()


def command_for(
    options: Reader,
    spec: DataSpec,
    identity: PriorIdentity | None,
    folder: Path,
    config: Any,
    names: Collection[str] = (),
) -> str:
    """The precompute command that adds these statistics of the examples of `spec` to the prior
    being read."""
    model = options.prior or options.model
    if options.prior and spec.tokenizer is None:
        spec = replace(spec, tokenizer=options.model)  # the ids are the trainee's
    if is_id(options.prior):
        model = f"THE_MODEL_OF_{options.prior}"
    cache = re.sub("(?<=://)[^/@]*@", "", options.cache or "CACHE")  # without its credentials
    words = spec.precompute_command(model, cache)
    more = statistics_option(names)
    if identity is None:
        return f"{words} {shlex.join(more)}".rstrip()
    own = options.prior is None
    if not own or identity.dtype != checkpoint_dtype(folder, config):
        more += ["--dtype", identity.dtype]
    if identity.backend == "vllm":
        more += ["--backend", "vllm", *_asked_of_vllm(identity)]
    elif not own or identity.attention != attention_for(config):
        more += ["--attention", identity.attention]
    if identity.logits_dtype != "float32":
        more += ["--logits-dtype", identity.logits_dtype]
    return f"{words} {shlex.join(more)}".rstrip()


def _asked_of_vllm(identity: PriorIdentity) -> list[str]:
    """The options that have vLLM quantise as it did for this prior, and attend."""
    stored = json.loads(identity.quantization or "{}").get("vllm", {})
    words = [] if identity.attention == "vllm" else ["--engine-arg"]
    words += [f"attention_backend={identity.attention.upper()}"] * len(words)
    for name, value in sorted(stored.items()):
        if name == "quantization":
            words += ["--quantization", value]
        else:
            words += ["--engine-arg", f"{name}={json.dumps(value)}"]
    return words


def statistics_option(names: Collection[str]) -> list[str]:
    """What has `prift precompute` store these statistics."""
    from prift.stats import EXTENDED  # here, since torch comes with it

    return ["--statistics", "extended"] if set(names) & set(EXTENDED) else []


def _asked(model: str, folder: Path, config: Any = None) -> Asked:
    from prift.ranks import from_rank_zero

    files = weight_files(folder)
    config = load_config(folder) if config is None else config
    return Asked(model, from_rank_zero(lambda: weights_digest(files)), config_digest(config))


def _no_prior_of(root: Root, found: Mapping[str, PriorIdentity], asked: Asked, command: str) -> str:
    lines = []
    for key, identity in found.items():
        lacks = asked.lacks(identity)
        shown = [f"{n} {_shown(a)}, asked for {_shown(b)}" for n, (a, b) in lacks.items()]
        if set(lacks) == {"config"}:
            shown.append("the weights are the same: another version of transformers, perhaps")
        lines.append(f"  --prior {key}  ({'; '.join([_model(root, key), *shown])})")
    return (
        f"{root.name} holds no prior of {printable(asked.model, 300)} (weights "
        f"{_shown(asked.weights)}, config {_shown(asked.config)}). It holds:\n"
        + "\n".join(lines)
        + f"\nChoose one of them with --prior ID, or run:\n  {command}"
    )


def _listing(root: Root, priors: Mapping[str, PriorIdentity]) -> str:
    """One line per prior: its model, and the fields in which these priors differ."""
    first = next(iter(priors.values()))
    names = sorted({name for v in priors.values() for name in first.differences(v)})
    lines = []
    for key, identity in priors.items():
        values = [f"{n} {_shown(getattr(identity, n, None))}" for n in names]
        lines.append(f"  --prior {key}  ({'; '.join([_model(root, key), ', '.join(values)])})")
    return "\n".join(lines).replace("; )", ")")


def model_name(root: Root, prior: str) -> str | None:
    """The model's name as the smallest part of the prior says, which is a claim; None where it says
    none."""
    names: list[Any] = []
    with contextlib.suppress(CacheError):  # the reader of that part will say what is wrong with it
        for part in sorted(root.parts(prior), key=lambda part: part.size)[:1]:
            names = [one.get("model") for one in provenance_in(root.fetch(prior, part))]
    named = [name for name in names if isinstance(name, str)]
    return printable(named[0]) if named else None


def _model(root: Root, prior: str) -> str:
    return model_name(root, prior) or "model unknown"


def _shown(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    return "none" if value is None else printable(str(value))
