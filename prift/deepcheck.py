"""`prift cache verify --deep`: does the model say what the cache says that it said?

Whose numbers lie in a cache is a claim of its writer. Here a sample of sequences is scored again,
by the real scorer, in the dtype, with the attention and the logits that the identity names. Keys
are hashes, so the data are needed; sequences that the cache lacks are passed over.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from prift import budget, spans
from prift.backends import hf
from prift.cache import PriorCache
from prift.dataspec import DataSpec
from prift.doubles import difference, over_budget
from prift.errors import CacheError, MissingPrior
from prift.identity import PriorIdentity, config_digest, weights_digest
from prift.inventory import Contents
from prift.models import load_config, locate, weight_files
from prift.request import Request, request
from prift.roots import IDENTITY, Root
from prift.stats import CORE, EXTENDED
from prift.verify import Problem, Verified

_DTYPES = ("float32", "bfloat16", "float16")
_ABSOLUTE = ("logprob", "entropy", "collision", "entropy_top20")
_NEAR_TIES = {budget.EXACT: 0.01, budget.ROUNDED: 1.0}  # share of its rank that a token may move
_SHARE = {budget.EXACT: 0.02, budget.ROUNDED: 0.5}  # of u beyond what moved ranks explain


def deepen(
    root: Root,
    priors: Sequence[str],
    model: str,
    spec: DataSpec,
    done: Verified,
    sample: int = 64,
    seed: int = 0,
    say: Callable[[str], None] = print,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Adds to `done` what a rescoring of `sample` sequences finds in those of the priors that are
    the model's; `advance` is told each. The same seed takes the same sequences.

    Raises CacheError where none of them is the model's, or where one holds none of the data;
    DataError, ModelError.
    """
    folder = locate(model, trust_remote_code=spec.trust_remote_code)
    config = load_config(folder, spec.trust_remote_code)
    weights, digest = weights_digest(weight_files(folder)), config_digest(config)
    found = [_identity(root, prior) for prior in priors]
    own = [one for one in found if one and (one.weights, one.config) == (weights, digest)]
    if not own:
        raise CacheError(_none_is(root, model, {"weights": weights, "config": digest}, found))
    tokenizer = spec.tokenizer_of(folder)
    examples = spec.examples(tokenizer, config)
    asked = request(examples).united()
    for identity in own:
        if identity.backend != "hf" or identity.dtype not in _DTYPES or identity.adapter:
            why = f"backend {identity.backend}, dtype {identity.dtype}, adapter {identity.adapter}"
            say(f"prior {identity.id} cannot be scored again here ({why})")
            continue
        try:
            check = _Rescored(root, identity, asked, sample, seed)
            stored = check.cache.read(check.rows.keys, check.rows.spans, check.names)
        except MissingPrior:
            raise
        except CacheError as error:
            mend = "mend that first, then run the same command again"
            done.problems.append(Problem(identity.id, root.where(identity.id), str(error), mend))
            continue
        scorer = hf.load(
            folder,
            config,
            identity,
            compiled=False,
            trust_remote_code=spec.trust_remote_code,
            say=say,
        )
        ids = [examples[int(i)].input_ids for i in check.rows.index]
        places = [spans.positions_of(one) for one in check.rows.spans]
        ends = np.cumsum([len(one) for one in places])
        for i, stats in scorer.score(ids, places, check.names):
            old = {n: v[ends[i] - len(places[i]) : ends[i]] for n, v in stored.items()}
            new = {n: getattr(stats, n).numpy() for n in check.names}
            check.compare(i, examples.where(int(check.rows.index[i])), places[i], old, new)
            advance(1)
        check.tell(done)


class _Rescored:
    """The rows of one prior that are scored again, and what came of it."""

    def __init__(self, root: Root, identity: PriorIdentity, asked: Request, sample: int, seed: int):
        self._root, self._identity = root, identity
        self.cache = PriorCache(root, identity)
        absent = self.cache.missing(asked.keys, asked.spans, CORE)
        present = np.setdiff1d(np.arange(len(asked.keys)), absent)
        if not len(present):
            raise MissingPrior(
                f"prior {identity.id} holds none of the {len(asked.keys):,} sequences of --data. "
                "The data options (--template, --max-length, ...) have to be those of "
                "`prift precompute`."
            )
        chosen = np.random.default_rng(seed).permutation(present)[:sample]
        self.rows = asked.subset(np.sort(chosen).tolist())
        more = [n for n in EXTENDED if not self._lacking(n)]
        self.names = (*CORE, *more)
        contents = Contents(root, identity.id)
        at = contents.index.find(self.rows.keys, *spans.flat(self.rows.spans), self.names)
        self._parts = [contents.parts[contents.index.owner[row]] for row in at]
        tf32 = torch.cuda.is_available() and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self._dtypes = (identity.dtype, identity.logits_dtype, *(["tf32"] if tf32 else []))
        self._problems: list[Problem] = []
        self._off: list[np.ndarray] = []
        self._moved = 0

    def _lacking(self, name: str) -> list[int]:
        return self.cache.missing(self.rows.keys, self.rows.spans, (*CORE, name))

    def compare(
        self, i: int, where: str, places: np.ndarray, old: dict[str, Any], new: dict[str, Any]
    ) -> None:
        """Row i: what is stored against what the model says; places: their positions."""
        part = self._parts[i]
        dtypes = (*self._dtypes, *(["float16"] if part.half else []))
        self._off.append(difference(old["logprob"], new["logprob"]))
        self._moved += int((old["rank"] != new["rank"]).sum())
        for name, at in disagreements(old, new, dtypes):
            what = (
                f"{where}, position {places[at]}: {name} is {old[name][at]:.6g}, the model says "
                f"{new[name][at]:.6g}, which rounding does not explain"
            )
            place = self._root.where(self._identity.id, part.part.name)
            mend = (
                "these numbers are another model's, or were changed. Find out who wrote the part; "
                f"delete {place}, and run the same `prift precompute` command again"
            )
            position = int(places[at])
            self._problems.append(
                Problem(self._identity.id, place, what, mend, position=position, statistic=name)
            )

    def tell(self, done: Verified) -> None:
        """Adds what was found."""
        off = np.concatenate(self._off)
        mean, limit = float(off.mean()), budget.bound(self._dtypes)
        if not mean <= limit and not self._problems:
            what = f"logprob differs from the model's by {mean:.2g} nats on average"
            mend = "delete the prior's folder and run the same `prift precompute` command again"
            self._problems.append(
                Problem(self._identity.id, self._root.where(self._identity.id), what, mend)
            )
        done.problems += self._problems
        done.deep.append(
            {
                "prior": self._identity.id,
                "sequences": len(self._off),
                "tokens": len(off),
                "mean_difference": mean if np.isfinite(mean) else None,
                "largest_difference": float(off.max()) if np.isfinite(mean) else None,
                "bound": limit,
                "moved_ranks": self._moved,
            }
        )


def disagreements(
    old: dict[str, np.ndarray], new: dict[str, np.ndarray], dtypes: Sequence[str]
) -> Iterator[tuple[str, int]]:
    """(statistic, worst token) of two scorings of one sequence that rounding does not explain.

    A rank moves where logits lie close together, and u with it by the probabilities of the tokens
    that were passed: each is close to the token's own.
    """
    bound = budget.bound(dtypes)
    with np.errstate(all="ignore"):
        for name in _ABSOLUTE:
            if name in old and over_budget(off := difference(old[name], new[name]), dtypes):
                yield name, int(off.argmax())
        if "expected_rank" in old:
            off = difference(np.log(old["expected_rank"]), np.log(new["expected_rank"]))
            if over_budget(off, dtypes):
                yield "expected_rank", int(off.argmax())
        room = 3 + _NEAR_TIES[bound] * new["rank"].astype(np.float64)
        for name in ("rank", "n_tie"):
            off = difference(old[name], new[name]) - room
            if (off > 0).any():
                yield name, int(off.argmax())
        moved = old["rank"].astype(np.float64) - new["rank"]
        passed = moved * np.exp(new["logprob"].astype(np.float64))
        share = np.exp(old["log_mass_rank"].astype(np.float64)) - np.exp(new["log_mass_rank"])
        off = np.abs(share + passed) - 0.05 * np.abs(passed) - _SHARE[bound]
        log_off = difference(old["log_mass_rank"], new["log_mass_rank"])
        off = np.maximum(off, np.where(moved == 0, log_off - bound * budget.TOKEN, -np.inf))
        if not (off <= 0).all():
            yield "log_mass_rank", int(np.nan_to_num(off, nan=np.inf).argmax())


def _identity(root: Root, prior: str) -> PriorIdentity | None:
    """None where it cannot be read, which the check of the files has told."""
    try:
        found = PriorIdentity.parse(root.identity(prior), f"{root.where(prior)}/{IDENTITY}")
    except CacheError:
        return None
    return found if found.id == prior else None


def _none_is(
    root: Root, model: str, own: dict[str, str], found: Sequence[PriorIdentity | None]
) -> str:
    lines = []
    for one in found:
        if one is not None:
            lacks = {n: str(getattr(one, n)) for n in own if getattr(one, n) != own[n]}
            said = ", ".join(f"{n} {v[:12]}, the model's {own[n][:12]}" for n, v in lacks.items())
            lines.append(f"  {one.id}  ({said})")
    return "\n".join([f"no prior in {root.name} is of the model {model}:", *lines])
