"""Which prior wrote a cache: the fields that change the numbers, and nothing else.

Files are hashed once and remembered by path, size, modification time and inode. Knows model
folders and JSON; knows no tensors.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from prift.errors import CacheError
from prift.home import cache_home
from prift.store import versions

# Fields of a config that say where it came from or how it is run, not what it computes.
_NOT_NUMBERS = frozenset(
    "_name_or_path _commit_hash _attn_implementation_autoset transformers_version dtype "
    "torch_dtype use_cache cache_implementation".split()
)
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class PriorIdentity:
    """What changes a prior's numbers. Two caches with equal identities may be joined.

    weights        sha256 over the sorted lines "<file name> <sha256 of the file>"
    config         sha256 of the loaded config's canonical JSON without the fields that only say
                   where it came from or how it is run
    adapter        likewise for an adapter, or None
    dtype          of weights and activations: 'float32', 'bfloat16', 'float16'
    logits_dtype   'float32', or 'bfloat16' for the rounding of the PriFT authors' code
    attention      implementation: 'sdpa', 'eager', ...
    quantization   canonical JSON of the quantization config, or None; where vLLM was given
                   arguments that may change the numbers, of both
    backend        'hf' or 'vllm'
    stats_version  prift.store.versions.STATS_VERSION
    """

    weights: str
    config: str
    adapter: str | None
    dtype: str
    logits_dtype: str
    attention: str
    quantization: str | None
    backend: str
    stats_version: int

    def json(self) -> str:
        """Canonical JSON: the bytes of prior.json."""
        return canonical_json(asdict(self))

    @property
    def id(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON; names the cache's folder."""
        return hashlib.sha256(self.json().encode()).hexdigest()[:16]

    @staticmethod
    def parse(text: str, where: str) -> "PriorIdentity":
        """Identity from the text of a prior.json. Raises CacheError naming `where`.

        One with further fields is a newer prift's: an identity that `refusal` refuses.
        """
        try:
            value = json.loads(text)
            names = [f.name for f in fields(PriorIdentity)]
            known = PriorIdentity(**{name: value.pop(name) for name in names})
            _check_types(known)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise CacheError(f"{where} is not a prior's identity: {why}") from error
        return _Newer(**asdict(known), further=canonical_json(value)) if value else known

    def refusal(self, names: Collection[str] = ()) -> str | None:
        """Why these statistics of the prior must not be read: it was written by a newer prift, or
        they have been defined anew since. None where nothing speaks against it."""
        if self.stats_version > versions.STATS_VERSION:
            return (
                f"it was written by a newer prift (version {self.stats_version} of the statistics; "
                f"this one knows up to {versions.STATS_VERSION}): upgrade prift"
            )
        if changed := sorted(versions.changed_since(self.stats_version) & set(names)):
            return (
                f"it holds {', '.join(changed)} as version {self.stats_version} of the statistics "
                f"defined it, which is not what version {versions.STATS_VERSION} means by it: "
                "score the data again"
            )
        return None

    def check(self, names: Collection[str] = ()) -> None:
        """Raises CacheError with the `refusal`, where there is one."""
        if why := self.refusal(names):
            raise CacheError(f"prior {self.id} cannot be read: {why}.")

    def differences(self, other: "PriorIdentity") -> dict[str, tuple[Any, Any]]:
        """Fields in which the two differ, with both values; None for a field that one lacks."""
        a, b = json.loads(self.json()), json.loads(other.json())
        return {n: (a.get(n), b.get(n)) for n in sorted(a | b) if a.get(n) != b.get(n)}


@dataclass(frozen=True, slots=True)
class _Newer(PriorIdentity):
    """An identity with fields that this prift does not know.

    further  canonical JSON of them
    """

    further: str

    def json(self) -> str:
        values = asdict(self)
        return canonical_json(values | json.loads(values.pop("further")))

    def refusal(self, names: Collection[str] = ()) -> str | None:
        unknown = ", ".join(map(repr, json.loads(self.further)))
        return (
            f"it was written by a newer prift (its identity has {unknown}, which this one does "
            "not know): upgrade prift"
        )


def _check_types(identity: PriorIdentity) -> None:
    for name, value in asdict(identity).items():
        wanted = {"stats_version": int, "adapter": str | None, "quantization": str | None}
        if not isinstance(value, wanted.get(name, str)) or isinstance(value, bool):
            raise ValueError(f"{name} is {str(value)[:40]!r}")


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def weights_digest(files: list[Path]) -> str:
    """sha256 over the sorted lines "<file name> <sha256 of the file>"."""
    lines = sorted(f"{f.name} {file_digest(f)}" for f in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def config_digest(config: Any) -> str:
    """sha256 of a transformers config, less the fields that do not change the numbers."""
    plain = json.loads(json.dumps(config.to_dict(), default=str))
    return hashlib.sha256(canonical_json(_numbers_only(plain)).encode()).hexdigest()


def quantization_of(config: Any) -> str | None:
    """Canonical JSON of the config's quantization, or None."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    return canonical_json(json.loads(json.dumps(quantization, default=str)))


def _numbers_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers_only(v) for k, v in value.items() if k not in _NOT_NUMBERS}
    if isinstance(value, list):
        return [_numbers_only(v) for v in value]
    return value


def file_digest(path: Path) -> str:
    """sha256 of a file, hex; remembered until its size, modification time or inode change."""
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
    memory, key = cache_home() / "file-hashes.json", str(path.resolve())
    match _known(memory).get(key):
        case [*known, str(digest)] if known == stamp:
            return digest
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file written just now may be written again without its time stamp showing it.
    if abs(time.time() - status.st_mtime) > _SETTLED_SECONDS:
        _remember(memory, key, [*stamp, digest])
    return digest


def _known(memory: Path) -> dict[str, Any]:
    """What the memory of hashes holds; nothing where it is absent or no such memory."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, key: str, entry: list) -> None:
    """Adds one entry to the memory of hashes. It saves time only, so failing to is no error."""
    beside = memory.with_name(f".{memory.name}.{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({**_known(memory), key: entry}))
        os.replace(beside, memory)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
