"""`prift cache verify`: is each byte of a cache what its writer wrote, and can it be true at all?

Every part is read whole from where it lies, not from a copy; what its statistics must be is in
invariants.py. Finds every problem and goes on. Damage and mistakes are found, forged numbers that
could be some model's are not: deepcheck.py asks the model.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence

from prift.errors import CacheError
from prift.identity import PriorIdentity, canonical_json
from prift.store.doubles import Doubles
from prift.store.inventory import Contents
from prift.store.partcheck import PartCheck
from prift.store.problems import Problem, Verified
from prift.store.roots import IDENTITY, Root


def verify(
    root: Root,
    priors: Sequence[str],
    vocabulary: Callable[[PriorIdentity | None], int | None] | None = None,
    advance: Callable[[int], None] = lambda _: None,
    whole: bool = True,
) -> Verified:
    """Checks these priors.

    whole       they are all there are: parts that lie outside of them are a problem
    vocabulary  V of a prior, where it is known
    advance     told how many bytes were checked

    Raises CacheError only where the store does not answer.
    """
    done = Verified(priors=len(priors))
    if whole:
        done.problems += [_nameless(root, name) for name in root.nameless()]
    for prior in priors:
        identity = _check_identity(root, prior, done.problems)
        try:
            listed = root.parts(prior)
        except CacheError as error:
            what, mend = str(error), "see there"
            done.problems.append(Problem(prior, root.where(prior), what, mend))
            continue
        size = vocabulary and vocabulary(identity)
        doubles = Doubles(Contents(root, prior), identity)
        for part in listed:
            PartCheck(root, prior, part, doubles, size, done).run()
            advance(part.size)
    return done


def size_of(root: Root, priors: Sequence[str]) -> int:
    """Bytes that `verify` will check."""
    total = 0
    for prior in priors:
        with contextlib.suppress(CacheError):  # which it reports
            total += sum(part.size for part in root.parts(prior))
    return total


def _nameless(root: Root, name: str) -> Problem:
    what = f"it holds parts and no {IDENTITY}, so that no reader looks at them"
    mend = (
        f"run the `prift precompute` command that made it again, which writes {IDENTITY}, or "
        f"delete {root.where(name)}"
    )
    return Problem(name, root.where(name), what, mend)


def _check_identity(root: Root, prior: str, problems: list[Problem]) -> PriorIdentity | None:
    where = f"{root.where(prior)}/{IDENTITY}"

    def wrong(what: str, mend: str | None = None) -> None:
        mend = mend or (
            f"delete {where} and run the same `prift precompute` command again, which writes it; "
            f"if that begins another prior, nobody knows whose {prior} is: delete its folder"
        )
        problems.append(Problem(prior, where, what, mend))

    try:
        text = root.identity(prior, fresh=True)
        identity = PriorIdentity.parse(text, where)
    except CacheError as error:
        wrong(str(error).removeprefix(f"{where} ").rstrip("."))
        return None
    if canonical_json(json.loads(text)) != text:
        wrong("its JSON is not canonical, so that its hash is not the prior's id")
    elif hashlib.sha256(text.encode()).hexdigest()[:16] != prior:
        wrong(f"it describes prior {identity.id}, not the one whose folder it lies in")
    elif why := identity.refusal():
        wrong(why, "install the prift that wrote it")
    return identity
