"""What explains the numbers of a part: names and versions. No paths of this machine, no user's
name, no credentials and no text get in; what others wrote is read as data and shown as such."""

import getpass
import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prift.text.dataspec import DataSpec
from prift.text.tokenizers import template_digest, tokenizer_digest

_PACKAGES = ("prift", "torch", "transformers", "tokenizers", "pyarrow", "numpy")
_KEY = "prift"
_MOST_BYTES = 1 << 20  # of another's provenance; prift writes about one thousand
_SECRETS = re.compile(
    r"(hf_|gh[pousr]_|sk-|AKIA)[\w-]{12,}"
    r"|(://)[^/@\s]*(?=@)"  # user:password of a URL
    r"|((?i:token|secret|password|passwd|key|key_?id|signature|sig|credentials?)=)[^&;\s\"]+"
)
_FOLDERS = re.compile(r"(?<![\w.:/])(~|/|[A-Za-z]:\\)[^\s\"']*[/\\]")  # of a path


def provenance(
    model: str, folder: Path, tokenizer: Any, spec: DataSpec, device: str, options: dict[str, Any]
) -> dict[str, str]:
    """Metadata for CacheWriter: one JSON object under the key "prift".

    model, folder  what was asked for, and where it was found
    options        further facts, as they are
    """
    name, revision = _model_name(model, folder)
    text = spec.text
    facts = {
        "model": name,
        "revision": revision,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer),
        "data": [last_name(d) for d in spec.data],
        "format": text.format,
        "labels": text.labels,
        "rendered": text.template,
        "split": text.split,
        "system_prompt": None if text.system is None else "given",
        "max_length": text.max_length,
        "limit": text.limit,
        **options,
        "packages": {p: version(p) for p in _PACKAGES},
        "device": device,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {_KEY: json.dumps(_cleaned(facts), sort_keys=True)}


def provenance_in(path: Path) -> list[dict[str, Any]]:
    """What a part says of itself: one object, or of each part that it was merged of. None where it
    says nothing that can be read. It is what its writers claim: see `printable`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        text = (pq.read_metadata(path).metadata or {}).get(_KEY.encode(), b"")
        found = json.loads(text) if len(text) <= _MOST_BYTES else []
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, RecursionError):
        return []
    return [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict)]


def printable(text: str, most: int = 80) -> str:
    """Text of another's on one line, without characters that steer a terminal."""
    plain = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


def last_name(where: str) -> str:
    """What to call a path, a URL or a hub's name: its last part; the two of a hub's name."""
    if "://" in where:
        return Path(urlsplit(where).path).name
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", where) and not Path(where).exists():
        return where
    return Path(os.path.abspath(Path(where).expanduser())).name


def _model_name(model: str, folder: Path) -> tuple[str, str | None]:
    """(name, revision): also of a folder that is a snapshot in the hub's cache."""
    place = folder.resolve()
    repository = re.fullmatch(r"models--(.+)", place.parents[1].name) if place.parts[2:] else None
    if repository and place.parent.name == "snapshots":
        return repository[1].replace("--", "/"), place.name
    return (place.name if Path(model).expanduser().exists() else model), None


def _cleaned(value: Any) -> Any:
    """The facts without what names the user or lets in: home folders, user names, credentials."""
    if isinstance(value, dict):
        return {key: _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(inner) for inner in value]
    if not isinstance(value, str):
        return value
    secrets = [v for k, v in os.environ.items() if re.search("(TOKEN|SECRET|PASSWORD|KEY)$", k)]
    for secret in (s for s in secrets if len(s) >= 8):
        value = value.replace(secret, "***")
    value = _SECRETS.sub(lambda found: f"{found[2] or found[3] or ''}***", value)
    value = _FOLDERS.sub("", value)
    return "***" if value in _own_names() else value


def _own_names() -> set[str]:
    """The user's name and that of the home folder, where `--data .` may have found them."""
    names = {Path.home().name}
    try:
        names.add(getpass.getuser())
    except (OSError, KeyError):  # a container's user may have none
        pass
    return names - {""}
