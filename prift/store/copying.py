"""Parts of a cache from one root to another: what is missing there, each verified by its hash.

A part's name is the hash of its content, so names alone say what is missing, and doing it again
goes on where it stopped.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from prift.cache import list_priors
from prift.errors import CacheError
from prift.identity import PriorIdentity
from prift.progress import progress
from prift.store.inventory import choose
from prift.store.remote import RemoteRoot
from prift.store.roots import IDENTITY, Part, Root, promises

_AT_ONCE = 4  # parts: a store answers slowly
_LISTINGS = 5  # of the source, while others compact it


@dataclass
class Copied:
    """What became of one prior's parts.

    parts    of the source; `there` of them were in the target before, `copied` came to it
    damaged  what is wrong with those that were not copied
    """

    prior: str
    parts: int = 0
    there: int = 0
    copied: int = 0
    copied_bytes: int = 0
    damaged: list[str] = field(default_factory=list)


def copy(source: Root, target: Root, priors: Sequence[str] = ()) -> list[Copied]:
    """Copies what the target lacks of these priors (ids, or beginnings of them), or of all.

    A part that is damaged, or cannot be read, is left out and named. Raises CacheError where a
    prior.json is none and where the target refuses; what was copied by then is kept.
    """
    identities = list_priors(source)
    chosen = choose(source, priors)
    lacking = {prior: _lacking(source, target, prior) for prior in chosen}
    total = sum(part.size for todo in lacking.values() for part in todo)
    with progress("copying", total=total, unit="B") as advance:
        return [
            _copied(source, target, identities[prior], lacking[prior], advance) for prior in chosen
        ]


def _lacking(source: Root, target: Root, prior: str) -> list[Part]:
    """Parts of the source that the target has not, or not in their full size."""
    there = {part.name: part.size for part in target.parts(prior)}
    return [part for part in source.parts(prior) if there.get(part.name) != part.size]


def _copied(
    source: Root,
    target: Root,
    identity: PriorIdentity,
    todo: list[Part],
    advance: Callable[[int], None],
) -> Copied:
    prior = identity.id
    try:
        target.begin(prior, identity.json())
    except OSError as error:
        raise _refused(target, prior, error) from error
    place = f"{target.where(prior)}/{IDENTITY}"
    if PriorIdentity.parse(target.identity(prior), place) != identity:
        raise CacheError(f"{place} does not belong there: it describes another prior. Delete it.")
    done = Copied(prior)

    def one(part: Part) -> str | None:
        said = _copy_part(source, target, prior, part)
        advance(part.size)
        return said

    tried: dict[str, str | None] = {}
    for _ in range(_LISTINGS):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for part, said in zip(todo, pool.map(one, todo), strict=True):
                tried[part.name] = said
                if said is None:
                    done.copied += 1
                    done.copied_bytes += part.size
        # What was compacted meanwhile is gone, and its rows are in parts that came.
        listed = {part.name for part in source.parts(prior)}
        gone = any(said and name not in listed for name, said in tried.items())
        todo = [p for p in _lacking(source, target, prior) if p.name not in tried] if gone else []
        if not todo:
            break
    done.damaged = [said for name, said in tried.items() if said and name in listed]
    done.parts = len(listed)
    done.there = done.parts - sum(name in listed for name in tried)
    return done


def _copy_part(source: Root, target: Root, prior: str, part: Part) -> str | None:
    """What is wrong with the part; None: it is in the target now. Raises CacheError."""
    try:
        try:
            file = source.download(prior, part, target.parts_folder(prior))
        except CacheError as error:
            return str(error)
        if not promises(part.name, file.sha256()):
            file.abandon()
            return (
                f"{source.where(prior, part.name)} is damaged: its content does not match the "
                "hash in its name"
            )
        try:
            copy = target.publish(prior, file, part.name)
        except BaseException:
            file.abandon()
            raise
        if isinstance(target, RemoteRoot):
            copy.unlink(missing_ok=True)  # nobody reads it on this disk
    except OSError as error:
        raise _refused(target, prior, error) from error
    return None


def _refused(target: Root, prior: str, error: OSError) -> CacheError:
    return CacheError(
        f"cannot write to the cache {target.where(prior)}: {error.strerror or error}. What was "
        "copied is kept; once there is room and permission, run the same command again."
    )
