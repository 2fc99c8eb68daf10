"""What of a cache no listed data use: whole parts, and the priors that nobody names.

A row is in use where its token ids are a sequence of the data, whatever positions are asked for.
Nothing is judged before all data were read whole, so a row that cannot be read ends it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from prift.cache import PriorCache, list_priors
from prift.choice import Asked, is_id
from prift.errors import CacheError
from prift.identity import PriorIdentity, config_digest, weights_digest
from prift.models import load_config, locate, weight_files
from prift.progress import progress
from prift.request import request
from prift.store.compact import alone
from prift.store.inventory import Contents
from prift.store.merging import merged
from prift.store.newfile import remove_stale
from prift.store.roots import Root
from prift.text.dataspec import DataSpec
from prift.text.examples import WINDOW_ROWS


@dataclass(frozen=True)
class Use:
    """Data whose rows are to stay.

    model  whose tokenizer and context make the sequences
    prior  whose statistics are read: an id, or a model; None: `model` itself
    """

    model: str
    spec: DataSpec
    prior: str | None = None


@dataclass
class Examined:
    """One prior.

    named      whether the data use it; of one that they do not, all parts count as unused
    sequences  distinct ones of the data; `found` of them have a row
    rows       duplicates included; `used` of them are of these sequences
    unused     names of the parts without a used row, with their rows and bytes
    mixed      names of the parts with used and other rows; mixed_rows: those others
    keys       'S16', sorted: of the sequences; held: bool, which of them have a row
    """

    prior: str
    named: bool
    sequences: int = 0
    found: int = 0
    parts: int = 0
    bytes: int = 0
    rows: int = 0
    used: int = 0
    unused: list[str] = field(default_factory=list)
    unused_rows: int = 0
    unused_bytes: int = 0
    mixed: list[str] = field(default_factory=list)
    mixed_rows: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, "S16"), repr=False)
    held: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), repr=False)

    def plain(self) -> dict[str, Any]:
        """Without the keys."""
        shown = [f.name for f in fields(self) if f.name not in ("keys", "held")]
        return {name: getattr(self, name) for name in shown}


def examine(root: Root, uses: Sequence[Use]) -> list[Examined]:
    """What is used of every prior. Reads all data, then the keys of all parts.

    Raises DataError for data that cannot be read whole, and CacheError for a part that cannot be
    read and where no prior of a use holds any of its data: other sequences were made of the texts
    then, and what it uses would seem unused.
    """
    identities = list_priors(root)
    asked: dict[str, list[np.ndarray]] = {}
    made: list[tuple[Use, np.ndarray, list[str]]] = []
    for use in uses:
        keys, priors = _keys(use.spec, use.model), _priors(identities, use)
        made.append((use, keys, priors))
        for prior in priors:
            asked.setdefault(prior, []).append(keys)
    found = {}
    for prior in identities:
        keys = np.unique(np.concatenate([np.zeros(0, "S16"), *asked.get(prior, [])]))
        found[prior] = _examined(root, prior, prior in asked, keys)
    for use, keys, priors in made:
        held = (found[prior].keys[found[prior].held] for prior in priors)
        if not any(np.isin(keys, one).any() for one in held):
            raise CacheError(_none_of(root, use, len(np.unique(keys))))
    return list(found.values())


def _none_of(root: Root, use: Use, sequences: int) -> str:
    where = f" in prior {use.prior}" if use.prior else ""
    return (
        f"{root.name} holds none of the {sequences:,} sequences of {', '.join(use.spec.data)} made "
        f"for {use.model}{where}, so they are not those that were scored: another --tokenizer, "
        "--template, --system or --max-length, perhaps. Give the options of the `prift precompute` "
        "that scored them."
    )


def sweep(root: Root, found: Sequence[Examined], others: bool = False) -> None:
    """Deletes the unused parts of the priors that are named; with `others` those that are not,
    whole. What was written since `examine` stays. Raises CacheError where it is refused."""
    for one in found:
        if not one.named and not others:
            continue
        try:
            for name in one.unused:
                root.remove(one.prior, name)
            folder = root.parts_folder(one.prior)
            if folder.is_dir():
                remove_stale(folder)
            if not root.parts(one.prior) and not any(folder.glob(".*.tmp")):
                root.remove_prior(one.prior)
        except OSError as error:
            raise _refused(root, one.prior, error) from error


def rewrite(
    root: Root,
    found: Sequence[Examined],
    grace: float,
    say: Callable[[str], None] = lambda line: None,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Makes the mixed parts anew without the rows that are not used; how many. Readers get the
    same bits for the sequences of the data.

    grace  seconds from the new parts to the deletion of the old ones: see compact

    A part stays as it is where another has its second: the new one might not take its place.
    """
    identities, old = list_priors(root), []
    for one in found:
        if not one.mixed:
            continue
        cache = PriorCache(root, identities[one.prior])
        for name in one.mixed:
            part = cache.parts.get(name)
            merge = part and alone(cache, part)
            if merge:
                merged(root, one.prior, merge, [cache.path(name)], wanted=one.keys)
                old.append((one.prior, name))
    if old and grace:
        say(f"{len(old)} parts are made anew; in {grace:,.0f} s the old ones are deleted")
        wait(grace)
    for prior, name in old:
        try:
            root.remove(prior, name)
        except OSError as error:
            raise _refused(root, prior, error) from error
    return len(old)


def _refused(root: Root, prior: str, error: OSError) -> CacheError:
    return CacheError(
        f"cannot delete in {root.where(prior)}: {error.strerror or error}. Once there is "
        "permission, run the same command again."
    )


def _keys(spec: DataSpec, model: str) -> np.ndarray:
    """'S16': keys of all sequences. Data weights draw from the data, so they do not count."""
    folder = locate(model, trust_remote_code=spec.trust_remote_code)
    config = load_config(folder, spec.trust_remote_code)
    tokenizer = spec.tokenizer_of(folder)
    found = [np.zeros(0, "S16")]
    with progress("tokenising", total=None, unit="rows") as advance:
        windows = replace(spec, weights=()).windows(tokenizer, config, WINDOW_ROWS, advance)
        for window in windows:
            found.append(np.unique(request(window.examples).keys))
    return np.concatenate(found)


def _priors(identities: dict[str, PriorIdentity], use: Use) -> list[str]:
    """Those whose statistics the use may read."""
    if use.prior is not None and is_id(use.prior):
        if use.prior not in identities:
            raise CacheError(
                f"the cache holds no prior {use.prior}. It holds: {', '.join(identities) or 'none'}"
            )
        return [use.prior]
    name = use.prior or use.model
    folder = locate(name, trust_remote_code=use.spec.trust_remote_code)
    config = config_digest(load_config(folder, use.spec.trust_remote_code))
    asked = Asked(name, weights_digest(weight_files(folder)), config)
    fitting = [prior for prior, identity in identities.items() if not asked.lacks(identity)]
    if not fitting:
        raise CacheError(
            f"the cache holds no prior of {name}. It holds: {', '.join(identities) or 'none'}. "
            "Name the one that the data use with --prior ID."
        )
    return fitting


def _examined(root: Root, prior: str, named: bool, keys: np.ndarray) -> Examined:
    one = Examined(prior, named, sequences=len(keys), keys=keys)
    if not named:  # nothing of it has to be read
        for part in root.parts(prior):
            one.unused.append(part.name)
            one.unused_bytes += part.size
        one.parts, one.bytes = len(one.unused), one.unused_bytes
        return one
    contents = Contents(root, prior)
    if contents.trouble:
        raise CacheError(contents.trouble[0])
    met = np.zeros(len(keys), bool)
    for held in contents.parts:
        at = np.searchsorted(keys, held.index.keys)
        used = keys[np.minimum(at, len(keys) - 1)] == held.index.keys
        met[at[used]] = True
        one.parts, one.bytes = one.parts + 1, one.bytes + held.part.size
        one.rows, one.used = one.rows + len(used), one.used + int(used.sum())
        if used.any():
            if not used.all():
                one.mixed.append(held.part.name)
                one.mixed_rows += int((~used).sum())
        else:
            one.unused.append(held.part.name)
            one.unused_rows += len(used)
            one.unused_bytes += held.part.size
    one.held, one.found = met, int(met.sum())
    return one
