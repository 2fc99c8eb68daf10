"""What the statistics of a token must be, whatever model wrote them: ranges, and what one column
says of another. The definitions are those of prift/stats.py; see docs/statistics.md.

q is the model's distribution, y the token, u the mass of the tokens with z(v) <= z(y):

    n_tie(y) q(y) <= u                       the ties and the token itself lie in u
    (rank - 1) q(y) <= 1 - u                 each token above is more probable than y
    H >= h(q(y))                             h: entropy of a coin; merging tokens loses entropy
    H >= -log q(y) where rank = 1            no token is more probable than y
    H >= -log sum q^2                        Renyi's order 2 below Shannon's
    q(y)^2 <= sum q^2, and sum q^2 <= q(y) where rank = 1
"""

import math
from collections.abc import Collection, Iterator

import numpy as np

_ROOM = 1e-4  # nats, and shares: what sums in float32 may lack
_RELATIVE = {False: 1e-6, True: 2.0**-10}  # of what is stored in float32, in half precision


def broken(
    values: dict[str, np.ndarray], half: Collection[str] = (), vocabulary: int | None = None
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(statistic, what is wrong with it, bool [N]: where) for each rule that some token breaks.

    values      statistics [N] by name; a rule about an absent one is left out
    half        names of those that were stored in half precision
    vocabulary  V, where it is known
    """
    with np.errstate(all="ignore"):
        wide = {name: column.astype(np.float64) for name, column in values.items()}
        for rule in (_ranges, _mass, _entropy, _extended):
            for name, what, where in rule(wide, half, vocabulary):
                if where.any():
                    yield name, what, where


def _room(values: np.ndarray, half: bool) -> np.ndarray:
    return (10 * _ROOM if half else _ROOM) + _RELATIVE[half] * np.abs(values)


def _ranges(v: dict, half: Collection[str], vocabulary: int | None) -> Iterator[tuple]:
    for name in ("logprob", "log_mass_rank"):
        if name in v:
            yield name, "is not 0 or less", ~(v[name] <= 0)
    top = math.log(vocabulary) if vocabulary else math.inf
    for name, most in (("entropy", top), ("entropy_top20", min(top, math.log(20)))):
        if name in v:
            yield name, "is not 0 or more", ~(v[name] >= 0)
            highest = most + _room(np.float64(top if top < math.inf else 0), name in half)
            yield name, f"is over {most:.4g}", (v[name] > highest) | (v[name] == math.inf)
    for name in ("rank", "n_tie", "expected_rank"):
        if name in v:
            yield name, "is not 1 or more", ~(v[name] >= 1 - _ROOM)
            most = (vocabulary or math.inf) * (1 + _RELATIVE[False])
            yield name, f"is over the vocabulary of {vocabulary}", v[name] > most
    if "rank" in v and "n_tie" in v and vocabulary:
        last = v["rank"] + v["n_tie"] - 1
        yield "n_tie", f"and rank are over the vocabulary of {vocabulary}", last > vocabulary
    if "collision" in v:
        least = (1 - _ROOM) / vocabulary if vocabulary else 0
        inside = (v["collision"] >= least) & (v["collision"] > 0) & (v["collision"] <= 1)
        yield "collision", "is not a sum of squared probabilities", ~inside


def _mass(v: dict, half: Collection[str], _: int | None) -> Iterator[tuple]:
    if "log_mass_rank" not in v:
        return
    log_u = v["log_mass_rank"]
    if "rank" in v:
        first = v["rank"] == 1
        yield "log_mass_rank", "is not 0, but rank is 1", first & (log_u != 0)
        if "log_mass_rank" not in half:  # where what is close to 0 is 0
            yield "log_mass_rank", "is 0, but rank is not 1", ~first & (log_u == 0)
    if "logprob" not in v:
        return
    some_half = bool({"logprob", "log_mass_rank"} & set(half))
    room = _room(v["logprob"], some_half)
    ties = np.log(np.maximum(v["n_tie"], 1)) if "n_tie" in v else 0.0
    tied = v["logprob"] + ties
    yield "log_mass_rank", "is below the probability of the token and its ties", log_u + room < tied
    if "rank" in v:
        above = (v["rank"] - 1) * np.exp(v["logprob"])
        room = np.minimum(room, 1.0) * np.maximum(above, 1.0)
        yield "rank", "is more than the mass above the token allows", above > room - np.expm1(log_u)


def _entropy(v: dict, half: Collection[str], _: int | None) -> Iterator[tuple]:
    if "entropy" not in v or "logprob" not in v:
        return
    logq, entropy = v["logprob"], v["entropy"]
    room = _room(entropy, "entropy" in half) + np.where(
        logq > -math.inf, _room(logq, "logprob" in half), 0
    )
    q = np.exp(logq)
    coin = -np.nan_to_num(q * logq) - np.nan_to_num((1 - q) * np.log1p(-q))
    yield "entropy", "is below that of a coin with the token's probability", entropy + room < coin
    if "rank" in v:
        first = v["rank"] == 1
        yield "entropy", "is below -logprob, but rank is 1", first & (entropy + room < -logq)


def _extended(v: dict, half: Collection[str], _: int | None) -> Iterator[tuple]:
    if "collision" not in v:
        return
    squares = v["collision"]
    if "entropy" in v:
        room = _room(v["entropy"], "entropy" in half)
        yield "collision", "says less entropy than there is", v["entropy"] + room < -np.log(squares)
    if "logprob" in v:
        q = np.exp(v["logprob"])
        room = _room(v["logprob"], "logprob" in half)
        yield "collision", "is below the token's share of it", squares + room < q * q
        if "rank" in v:
            first = v["rank"] == 1
            yield "collision", "is over the largest probability", first & (squares > q + room)
