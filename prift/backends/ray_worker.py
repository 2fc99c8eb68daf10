"""What one Ray worker does: loads the prior once, then turns tables of sequences into tables of
statistics. Knows Arrow and a scorer; nothing of Ray.

What a user has to mend, and what the scorer says, comes back as notes: rows beside the statistics.
An exception would cost what the worker had finished, and Ray would show a traceback for it.
"""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from prift import errors
from prift.backends import BadLogits, Scorer, TooLarge, hf
from prift.errors import ModelError, PriftError
from prift.identity import PriorIdentity
from prift.models import load_config, locate
from prift.stats import TokenStats

_WHOLE = ("rank", "n_tie")  # statistics that are int32; the others are float32
_NOBODY = -1  # the index of a note that concerns no sequence


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker is to do.

    model     the folder, which has to be the same on every machine, or a hub name
    identity  what its numbers have to be
    names     statistics
    gpus      of each worker; 0: on the CPU
    """

    model: str
    identity: PriorIdentity
    names: tuple[str, ...]
    gpus: int
    batch_tokens: int | None = None
    compiled: bool | None = None
    trust_remote_code: bool = False


class Worker:
    """Takes what `sequences_table` makes; `results` reads its answers.

    successor  of a worker that died
    """

    def __init__(self, job: Job, successor: bool = False):
        self._job, self._notes = job, []
        if successor:
            self._say(f"a Ray worker died on {socket.gethostname()}; Ray has started another")
        try:
            self._scorer = _load(job, self._say)
        except PriftError as error:
            self._scorer, self._refusal = None, _as_note(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Statistics of these sequences, as far as no note says that there was an error."""
        index, rows = table["index"].to_numpy(), []
        if self._scorer is None:
            self._note(_NOBODY, self._refusal)
            return self._told(rows)
        ids, positions = (_Rows(table[name]) for name in ("input_ids", "positions"))
        try:
            for i, stats in self._scorer.score(ids, positions, self._job.names):
                rows.append((int(index[i]), stats))
        except (BadLogits, TooLarge) as error:
            self._note(int(index[error.index]), _as_note(error))
        except PriftError as error:
            self._note(_NOBODY, _as_note(error))
        return self._told(rows)

    def _say(self, line: str) -> None:
        self._note(_NOBODY, {"said": line})

    def _note(self, index: int, note: dict[str, Any]) -> None:
        self._notes.append((index, json.dumps(note)))

    def _told(self, rows: list[tuple[int, TokenStats]]) -> pa.Table:
        notes, self._notes = self._notes, []
        return _results_table(rows, notes, self._job.names)


def _load(job: Job, say: Callable[[str], None]) -> Scorer:
    """The scorer. Raises ModelError, and where this machine has another model than the driver."""
    folder = locate(job.model, trust_remote_code=job.trust_remote_code)
    config = load_config(folder, job.trust_remote_code)
    asked = job.identity
    how = {n: getattr(asked, n) for n in ("dtype", "logits_dtype", "attention")}
    differing = hf.identify(folder, config, **how).differences(asked)
    if differing:
        raise ModelError(
            f"--model {job.model} is not the same on {socket.gethostname()} as where the command "
            f"was started (differing: {', '.join(differing)}). Put the same files and the same "
            "packages on all machines of the Ray cluster."
        )
    return hf.load(
        folder,
        config,
        asked,
        batch_tokens=job.batch_tokens,
        compiled=job.compiled,
        device=None if job.gpus else "cpu",
        trust_remote_code=job.trust_remote_code,
        say=say,
    )


def _as_note(error: Exception) -> dict[str, Any]:
    note = {"error": type(error).__name__}
    if isinstance(error, BadLogits):
        return {**note, "position": error.position}
    return note if isinstance(error, TooLarge) else {**note, "message": str(error)}


def sequences_table(
    index: Sequence[int], sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray]
) -> pa.Table:
    """What a worker takes: the number of each sequence, its ids and the positions to score."""
    return pa.table(
        {
            "index": pa.array(index, pa.int64()),
            "input_ids": _lists(sequences, np.int32),
            "positions": _lists(positions, np.int32),
        }
    )


def results(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[int, TokenStats] | str]:
    """(index, statistics) of each sequence, and lines that a worker said.

    Raises what the worker's scorer raised, behind the sequences that were finished before it.
    """
    columns = {name: _Rows(table[name]) for name in names}
    for i, (index, note) in enumerate(
        zip(table["index"].to_pylist(), table["note"].to_pylist(), strict=True)
    ):
        if note is None:
            yield index, TokenStats(**{n: torch.from_numpy(c[i]) for n, c in columns.items()})
        elif "said" in (told := json.loads(note)):
            yield told["said"]
        elif told["error"] == "BadLogits":
            raise BadLogits(index, told["position"])
        elif told["error"] == "TooLarge":
            raise TooLarge(index)
        else:
            raise getattr(errors, told["error"])(told["message"])


def _results_table(
    rows: list[tuple[int, TokenStats]], notes: list[tuple[int, str]], names: Sequence[str]
) -> pa.Table:
    columns = {
        "index": pa.array([i for i, _ in rows] + [i for i, _ in notes], pa.int64()),
        "note": pa.array([None] * len(rows) + [note for _, note in notes], pa.string()),
    }
    for name in names:
        dtype = np.int32 if name in _WHOLE else np.float32
        values = [getattr(stats, name).numpy() for _, stats in rows]
        columns[name] = _lists(values + [np.zeros(0, dtype)] * len(notes), dtype)
    return pa.table(columns)


def _lists(arrays: Sequence[np.ndarray], dtype: type) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(offsets, pa.array(values))


class _Rows(Sequence):
    """The lists of a column as numpy arrays over one writable copy."""

    def __init__(self, column: pa.ChunkedArray):
        lists = column.combine_chunks()
        self._values = np.array(lists.flatten())
        self._ends = np.cumsum([0, *lists.value_lengths().to_pylist()])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> np.ndarray:
        return self._values[self._ends[i] : self._ends[i + 1]]
