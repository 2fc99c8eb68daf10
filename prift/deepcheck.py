"""`prift cache verify --deep`: does the model say what the cache says that it said?

Whose numbers lie in a cache is a claim of its writer. Here a sample of sequences is scored again,
by the real scorer, in the dtype, with the attention and the logits that the identity names. Keys
are hashes, so the data are needed; sequences that the cache lacks are passed over.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from prift.agreement import bound, difference, disagreements
from prift.backends import hf
from prift.cache import PriorCache
from prift.errors import CacheError, MissingPrior
from prift.identity import PriorIdentity, config_digest, weights_digest
from prift.models import load_config, locate, weight_files
from prift.plan import Plan
from prift.request import Request, request
from prift.scoring import score_plan
from prift.stats import CORE, EXTENDED
from prift.store import spans
from prift.store.inventory import Contents
from prift.store.problems import Problem, Verified
from prift.store.roots import IDENTITY, Root
from prift.text.dataspec import DataSpec
from prift.text.examples import Examples

_DTYPES = ("float32", "bfloat16", "float16")


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

    Raises CacheError where none of them is the model's or all of those hold none of the data;
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
    lacking: list[MissingPrior] = []
    for identity in own:
        if identity.backend != "hf" or identity.dtype not in _DTYPES or identity.adapter:
            why = f"backend {identity.backend}, dtype {identity.dtype}, adapter {identity.adapter}"
            say(f"prior {identity.id} cannot be scored again here ({why})")
            continue
        try:
            check = _Rescored(root, identity, examples, asked, sample, seed)
        except MissingPrior as error:
            lacking.append(error)
            continue
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
        everything = np.ones(len(check.rows.keys), bool)
        plan = Plan(examples, check.rows, fresh=everything, last=True)
        score_plan(scorer, plan, check.names, check.compare, lambda tokens: advance(1))
        check.tell(done)
    if len(lacking) == len(own):
        raise lacking[0]


class _Rescored:
    """The rows of one prior that are scored again, and what came of it."""

    def __init__(
        self,
        root: Root,
        identity: PriorIdentity,
        examples: Examples,
        asked: Request,
        sample: int,
        seed: int,
    ):
        self._root, self._identity, self._examples = root, identity, examples
        cache = PriorCache(root, identity)
        absent = cache.missing(asked.keys, asked.spans, CORE)
        present = np.setdiff1d(np.arange(len(asked.keys)), absent)
        if not len(present):
            raise MissingPrior(
                f"prior {identity.id} holds none of the {len(asked.keys):,} sequences of --data. "
                "The data options (--template, --max-length, ...) have to be those of "
                "`prift precompute`."
            )
        chosen = np.random.default_rng(seed).permutation(present)[:sample]
        self.rows = asked.subset(np.sort(chosen).tolist())
        keys, runs = self.rows.keys, self.rows.spans
        more = [n for n in EXTENDED if not cache.missing(keys, runs, (*CORE, n))]
        self.names = (*CORE, *more)
        self._stored = cache.read(keys, runs, self.names)
        self._ends = np.cumsum([spans.count(one) for one in runs])
        self._at = {bytes(key): i for i, key in enumerate(keys)}
        contents = Contents(root, identity.id)
        at = contents.index.find(keys, *spans.flat(runs), self.names)
        self._parts = [contents.parts[contents.index.owner[row]] for row in at]
        tf32 = torch.cuda.is_available() and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self._dtypes = (identity.dtype, identity.logits_dtype, *(["tf32"] if tf32 else []))
        self._problems: list[Problem] = []
        self._off: list[np.ndarray] = []
        self._moved = 0

    def compare(self, row: tuple) -> None:
        """A row as the model has it, CacheWriter.add's arguments, with what is stored."""
        key, _, runs, new = row
        i, places = self._at[key], spans.positions_of(runs)
        begin = self._ends[i] - len(places)
        old = {n: v[begin : self._ends[i]] for n, v in self._stored.items()}
        where = self._examples.where(int(self.rows.index[i]))
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
        mean, limit = float(off.mean()), bound(self._dtypes)
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
