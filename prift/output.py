"""The output folder of a training run: what may be resumed there, and what a full disk says."""

import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from prift.errors import OptionError, PriftError
from prift.ranks import is_rank_zero
from prift.store.newfile import NewFile

OPTIONS_FILE = "prift.yaml"
_MAY_CHANGE = {"training", "output", "cache", "full_metrics_steps", "merge", "skip_check"}
_MAY_CHANGE |= {"packing"}


def checkpoint_of(output: Path, resume: bool) -> str | None:
    """The checkpoint to go on from. Raises OptionError for an output folder that is in use."""
    used = output.is_dir() and any(output.iterdir())
    if not resume:
        if used or output.is_file():
            raise OptionError(
                f"--output {output} is not empty. Choose another folder, delete it, or go on from "
                "its last checkpoint with --resume."
            )
        return None
    last = last_checkpoint(output)
    if last is None:
        raise OptionError(
            f"--resume: {output} holds no whole checkpoint. To start anew leave --resume out and "
            "name an empty folder; `-- --save_steps N` says how often one is written."
        )
    if not any((last / name).exists() for name in ("scheduler.pt", "latest")):  # DeepSpeed's
        raise OptionError(
            f"--resume: {last} holds the model alone (save_only_model), without the optimiser's "
            "state. Start anew, with another --output."
        )
    return str(last)


def last_checkpoint(output: Path) -> Path | None:
    """The whole checkpoint of the most steps."""
    whole = [p for p in output.glob("checkpoint-*") if _is_whole(p)]
    return max(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """False for what a kill or a full disk left behind: the state is written last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return checkpoint.name.removeprefix("checkpoint-").isdecimal()


@contextmanager
def writing(output: str) -> Iterator[None]:
    """Turns a refused write into a PriftError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_of_torch_save(error):
            raise
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        if isinstance(error, RuntimeError):
            reason = f"torch.save stopped short, as on a full disk ({reason})"
        raise PriftError(
            f"cannot write to --output {output}: {reason}. Whole checkpoints in it are kept; once "
            "there is room and permission, go on from the last with --resume."
        ) from error


def _is_of_torch_save(error: BaseException) -> bool:
    """torch.save fails with a RuntimeError of its archive writer, whose words vary."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        c.co_name == "save" and c.co_filename == torch.serialization.__file__ for c in frames
    )


def check_same_run(output: str, resolved: Mapping[str, Any]) -> None:
    """Raises OptionError where the run to be resumed was started with other options.

    Places, logging and TrainingArguments may change; what is learnt from what may not.
    """
    try:
        before = yaml.safe_load((Path(output) / OPTIONS_FILE).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionError(f"--resume: {output}/{OPTIONS_FILE} cannot be read: {error}") from error
    if not isinstance(before, dict):
        raise OptionError(f"--resume: {output}/{OPTIONS_FILE} holds no options")
    for name in sorted((set(before) | set(resolved)) - _MAY_CHANGE):
        if before.get(name) != resolved.get(name):
            raise OptionError(
                f"--resume: the run in {output} was started with {name} {before.get(name)!r}, "
                f"not {resolved.get(name)!r}. Go on with the options in {OPTIONS_FILE} (they are a "
                "valid --config), or start anew in another --output."
            )


def write_options(output: str, resolved: Mapping[str, Any]) -> None:
    """Writes prift.yaml, a valid --config of the run; whole or not at all."""
    if is_rank_zero():
        Path(output).mkdir(parents=True, exist_ok=True)
        file = NewFile(Path(output))
        try:
            file.write(yaml.safe_dump(dict(resolved), sort_keys=False).encode())
            file.publish(OPTIONS_FILE)
        except OSError:
            file.abandon()
            raise
