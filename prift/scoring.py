"""A plan's rows through a scorer, on to where they are stored."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prift.backends import BadLogits, Scorer, TooLarge, TooLong
from prift.errors import ModelError
from prift.plan import Plan
from prift.store import spans
from prift.store.claims import Claims
from prift.store.writer import CacheWriter


class Storing:
    """Rows into the writer; and once a window's rows are visible, its claim is given back.

    handle(row)   CacheWriter.add's arguments
    handle(name)  all rows of the plan of this name are here
    """

    def __init__(self, writer: CacheWriter, claims: Claims):
        self._writer, self._claims = writer, claims
        self._finished: list[str] = []

    def handle(self, item: tuple | str) -> None:
        if isinstance(item, tuple):
            self._writer.add(*item)
        else:
            self._finished.append(item)
            if self._claims.company():  # so that none does again what only waits to be seen
                self._writer.flush()
        if self._finished and not self._writer.pending:
            self._claims.release(self._finished)
            self._finished = []


def score_plan(
    scorer: Scorer,
    plan: Plan,
    names: Sequence[str],
    put: Callable[[tuple], None],
    advance: Callable[[int], None],
) -> np.ndarray:
    """Scores the plan's rows and puts each where it is stored: CacheWriter.add's arguments.

    advance  called with the tokens of each sequence

    Returns the rows, of those to be scored, that the backend cannot score exactly and left out.
    Raises ModelError, naming the example, for logits that are no distribution and for a sequence
    that memory, or the backend, does not hold.
    """
    examples, todo = plan.examples, plan.todo
    size = len(todo.keys)
    sequences = _Lazy(size, lambda i: examples[int(todo.index[i])].input_ids)
    positions = _Lazy(size, lambda i: spans.positions_of(todo.spans[i]))
    left = np.ones(size, bool)
    try:
        for i, stats in scorer.score(sequences, positions, names):
            values = {n: getattr(stats, n).numpy() for n in stats.names()}
            length = len(sequences[i])
            put((bytes(todo.keys[i]), length, todo.spans[i], values))
            left[i] = False
            advance(length)
    except BadLogits as error:
        raise ModelError(
            f"{examples.where(todo.index[error.index])}: the model's logits for token "
            f"{error.position} are NaN, +inf, or all -inf. Nothing of this example was stored. "
            "Half-precision overflow is the usual cause: try --dtype bfloat16 or float32."
        ) from error
    except TooLarge as error:
        raise ModelError(
            f"{examples.where(todo.index[error.index])}: a sequence of "
            f"{len(sequences[error.index]):,} tokens does not fit into memory even alone. Cut it "
            "with --max-length."
        ) from error
    except TooLong as error:
        raise ModelError(
            f"{examples.where(todo.index[error.index])}: a sequence of "
            f"{len(sequences[error.index]):,} tokens is longer than the {error.most:,} that vLLM "
            f"was started for. Cut it with --max-length {error.most}, or take more with "
            "--engine-arg max_model_len=N (one more than the longest has)."
        ) from error
    return np.flatnonzero(left)


class _Lazy(Sequence):
    """A sequence whose items are made when asked for, so that memory stays flat."""

    def __init__(self, size: int, get: Callable[[int], Any]):
        self._size, self._get = size, get

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._size:
            raise IndexError(i)
        return self._get(i)
