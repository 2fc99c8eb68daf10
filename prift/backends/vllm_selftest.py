"""Whether the columns that came back are the statistics: vLLM's own answer to the same prompt says.

Asked before anything is scored. A version of vLLM whose insides have moved may take the exchanged
function and hand it other rows, other targets, or logits that are none.
"""

from collections.abc import Iterator

import numpy as np

from prift.backends.vllm_engine import Engine
from prift.backends.vllm_worker import COLUMNS, columns_for
from prift.errors import ModelError
from prift.identity import PriorIdentity
from prift.stats import CORE
from prift.store import invariants

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids [N, K+1], columns [N, K+1] and ranks [N]."""

PUBLIC_K = 20
"""Of vLLM's own answer: as many as it gives by default."""

_ROOM = {"float32": 1e-3}  # nats between two runs of one prompt; other dtypes: 0.1
_MASS = 0.005  # share of the mass by which sums of listed probabilities may be off


def probe(vocabulary: int, most: int) -> list[list[int]]:
    """Two prompts of tokens from all over the vocabulary, of at most `most` tokens."""
    ids = np.linspace(0, vocabulary - 1, max(2, min(24, most))).astype(int).tolist()
    return [ids, ids[::-1]]


def install(
    engine: Engine, vocabulary: int, identity: PriorIdentity, compiled: bool | None, wanted: bool
) -> tuple[str | None, str]:
    """Has the workers compute statistics: (why that does not work, how it works). Where it does
    not, the workers are as they were, or dead.

    wanted  False: nothing stays exchanged

    Raises ModelError where the model does not run at all, and where its logits are not float32, or
    may not be, though that is asked for: bounds would store what they round as well.
    """
    prompts = probe(vocabulary, engine.longest)
    K = min(PUBLIC_K, engine.most_listed)
    public = _asked(engine, prompts, K)
    if not wanted and wrong_head(identity, set()) is None:
        return "not asked for", ""
    compiled = compiled if wanted else False
    answers = engine.call("prift_install", identity.logits_dtype == "bfloat16", compiled)
    told = "; ".join(sorted({words for _, words in answers}))
    why = None if all(done for done, _ in answers) else told
    seen: set[str] = set()
    if why is None:
        dtype = "bfloat16" if {identity.dtype, identity.logits_dtype} != {"float32"} else "float32"
        targets = np.concatenate([prompt[1:] for prompt in prompts])
        try:
            ours = _asked(engine, prompts, columns_for(CORE))
            why = fault(ours, public, targets, vocabulary, dtype)
            seen = set().union(*engine.call("prift_dtypes"))
        except ModelError as error:
            why = str(error)
    if (wrong := wrong_head(identity, seen)) is not None:
        raise ModelError(
            f"{wrong}{f' ({why})' if why else ''}. Use --dtype float32, --backend hf, or ask for "
            "what it has: --dtype bfloat16 --logits-dtype bfloat16"
        )
    if (why is not None or not wanted) and engine.alive:
        engine.call("prift_remove")
    if not wanted:
        return "not asked for", ""
    return (f"in the self-test {why}" if why and why != told else why), told


def wrong_head(identity: PriorIdentity, seen: set[str]) -> str | None:
    """What is wrong with logits of the dtypes `seen`, or None. A half-precision model whose logits
    were not seen might have a head that rounds them; a float32 model has none."""
    if identity.logits_dtype != "float32" or seen == {"float32"}:
        return None
    if seen:
        return f"vLLM's logits are {', '.join(sorted(seen))}, and float32 is asked for"
    if identity.dtype != "float32":
        return "vLLM does not show whether its logits are float32, as is asked for"
    return None


def _asked(engine: Engine, prompts: list[list[int]], K: int) -> Columns:
    """What the engine answers, of one prompt behind the other. One by one, so that both ways run
    them alike."""
    answers = [engine.ask([prompt], K)[0] for prompt in prompts]
    ids, columns, ranks = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    return ids, columns, ranks


def fault(
    ours: Columns,
    public: Columns,
    targets: np.ndarray,
    vocabulary: int,
    dtype: str,
) -> str | None:
    """What is wrong with the columns of N positions, or None.

    ours, public  of the exchanged function, and of vLLM's own for PUBLIC_K or fewer
    targets       int [N]
    """
    return next(_faults(ours, public, targets, vocabulary, dtype), None)


def _faults(ours, public, targets, vocabulary, dtype) -> Iterator[str]:
    (ids, columns, rank), K = ours, columns_for(CORE)
    if columns.shape != (len(targets), K + 1):
        yield f"columns of the shape {columns.shape}, not {(len(targets), K + 1)}"
        return
    marks = np.minimum(np.arange(K), vocabulary - 1)
    if not (ids[:, 0] == targets).all() or not (ids[:, 1:] == marks).all():
        yield "the columns are not those of the worker's function"
        return
    # Where the model's own answer is NaN there is nothing to compare; scoring tells by sequence.
    told = ~np.isnan(public[1]).any(1)
    if not told.any():
        yield "vLLM's own answer is NaN at every position, so nothing is verified"
        return
    columns, rank, targets = columns[told], rank[told], targets[told]
    listed, own, reaching = (part[told] for part in public)
    values = {name: columns[:, at] for at, name in enumerate(COLUMNS[: K + 1])}
    values["rank"] = rank
    own = np.maximum(own.astype(np.float64), -1e4)
    for name, what, _ in invariants.broken(values, vocabulary=vocabulary):
        yield f"{name} {what}"
    room = _ROOM.get(dtype, 0.1)
    with np.errstate(invalid="ignore"):
        off = np.nan_to_num(np.abs(values["logprob"] - own[:, 0]), nan=0.0)
    if off.max() > room:
        yield f"logprob is off by {off.max():.3g}"
    last = rank + values["n_tie"] - 1
    if (np.abs(last - reaching) > 3 + (0.02 if dtype == "float32" else 0.5) * reaching).any():
        yield "rank is not vLLM's"
    yield from _between(values, own, listed[:, 1:] == targets[:, None], vocabulary, room)


def _between(
    values: dict[str, np.ndarray],
    own: np.ndarray,
    is_target: np.ndarray,
    vocabulary: int,
    room: float,
) -> Iterator[str]:
    """Mass rank and entropy must lie where the most probable tokens say that they do. Tokens as
    close to the target as two runs may differ may stand on either side of it."""
    target, top = own[:, :1], own[:, 1:]
    q, K = np.exp(top), top.shape[1]
    slack = _MASS + room
    mass = np.exp(values["log_mass_rank"].astype(np.float64))
    sure = (q * (top > target + 2 * room)).sum(1)
    perhaps = (q * ((top > target - 2 * room) & ~is_target)).sum(1)
    rest = np.maximum(1 - q.sum(1), 0)
    unlisted = np.where(top[:, -1] > target[:, 0] - 2 * room, rest, 0)
    if ((mass > 1 - sure + slack) | (mass < 1 - perhaps - unlisted - slack)).any():
        yield "mass rank is not where the most probable tokens say"
    listed = -(q * top).sum(1)
    least = listed - rest * top[:, -1]
    many = max(vocabulary - K, 1)
    most = listed + rest * (np.log(many) - np.log(np.maximum(rest, 1e-30)))
    entropy, slack = values["entropy"], slack * np.log(vocabulary)
    if ((entropy > most + slack) | (entropy < np.minimum(least, most) - slack)).any():
        yield "entropy is not where the most probable tokens say"
