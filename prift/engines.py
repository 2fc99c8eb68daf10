"""Who runs the prior: the options of precompute that say so, and the backend they choose."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prift.backends import Scorer, hf, ray_data
from prift.errors import OptionError
from prift.identity import PriorIdentity
from prift.shards import Shard
from prift.text.examples import WINDOW_ROWS


@dataclass(frozen=True)
class PrecomputeOptions:
    """How the prior is run. See `prift precompute --help`.

    window_rows  see examples.load_windows; None: what suits the engine
    shard        the share of the sequences that is scored here; None: all
    device       see placement.place
    """

    dtype: str = "auto"
    logits_dtype: str = "float32"
    attention: str = "auto"
    positions: str = "labels"
    statistics: str = "core"
    batch_tokens: int | None = None
    compiled: bool | None = None
    part_seconds: float = 60.0
    storage: str = "float32"
    trust_remote_code: bool = False
    engine: str = "local"
    ray_workers: int | None = None
    ray_gpus: int | None = None
    window_rows: int | None = None
    shard: Shard | None = None
    device: str | None = None


def identify(folder: Path, config: Any, options: PrecomputeOptions) -> PriorIdentity:
    """Of the prior that these options run."""
    return hf.identify(
        folder,
        config,
        dtype=options.dtype,
        logits_dtype=options.logits_dtype,
        attention=options.attention,
    )


def suited_rows(options: PrecomputeOptions) -> int:
    """Rows of a window for the engine. Raises OptionError where that is not there."""
    if options.engine == "ray":
        ray_data.check_installed()
        return ray_data.WINDOW_ROWS
    if options.ray_workers is not None or options.ray_gpus is not None:
        raise OptionError("--ray-workers and --ray-gpus are for --engine ray")
    return WINDOW_ROWS


def load_scorer(
    model: str,
    folder: Path,
    config: Any,
    identity: PriorIdentity,
    options: PrecomputeOptions,
    say: Callable[[str], None],
) -> Scorer:
    """Raises whatever a backend raises that cannot load the model."""
    how: dict[str, Any] = {
        "batch_tokens": options.batch_tokens,
        "compiled": options.compiled,
        "trust_remote_code": options.trust_remote_code,
        "say": say,
    }
    if options.engine == "ray":
        share = {"workers": options.ray_workers, "gpus": options.ray_gpus}
        return ray_data.load(model, identity, **share, **how)
    return hf.load(folder, config, identity, device=options.device, **how)
