"""Examples: THE only tokenising path, so that both commands see the same ids.

`load_examples` reads every row (loader.py), refuses what cannot be trained on, and repeats or
thins out each dataset by its weight. `load_windows` gives the same examples, each once, a window
at a time, so that work on one can go on while the next is read.
"""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prift.errors import DataError, OptionError
from prift.progress import progress
from prift.text.loader import Loader, Store, TextOptions
from prift.text.report import Report

__all__ = ["Example", "Examples", "Report", "TextOptions", "Window", "load_examples"]

WINDOW_ROWS = 8192
"""Examples of a window: enough to sort them by length into full batches, few enough to hold some
windows in memory. Fixed, since what is batched together decides the last bits of the results."""

_ROW_TOKENS = 2048  # on average at most: a window of longer examples ends earlier, at 80 MB,
_MOST_TOKENS = 1 << 28  # and one of very many rows at 1.3 GB


@dataclass(frozen=True, slots=True)
class Example:
    """Ids, which of them are trained, and whose words they are.

    input_ids   int32 [T], a read-only view
    label_mask  bool [T]; entry 0 is always False, since position 0 has no statistics
    roles       uint8 [T]: codes of prift.roles
    """

    input_ids: np.ndarray
    _marks: np.ndarray  # as Store has them

    @property
    def label_mask(self) -> np.ndarray:
        return (self._marks & 1).astype(bool)

    @property
    def roles(self) -> np.ndarray:
        return self._marks >> 1


class Examples(Sequence[Example]):
    """Examples in flat arrays: 5 bytes a token, about 40 an example, however they are repeated.

    lengths       int64 [N]: tokens of each example
    label_counts  int64 [N]: label tokens of each example, never 0
    num_tokens    of one epoch; num_labels likewise
    report        what loading did
    """

    def __init__(self, store: Store, order: np.ndarray, report: Report) -> None:
        self._ids = np.frombuffer(store.ids, np.int32)
        self._marks = np.frombuffer(store.marks, np.uint8)
        self._offsets = np.frombuffer(store.offsets, np.int64)
        self._ids.flags.writeable = self._marks.flags.writeable = False  # examples are views
        self._store = store
        self._order = order
        self.report = report
        self.lengths = np.diff(self._offsets)[order]
        self.num_tokens = int(self.lengths.sum())
        self.label_counts = np.frombuffer(store.labels, np.int64)[order]
        self.num_labels = int(self.label_counts.sum())

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = self._order[index]
        begin, end = self._offsets[at], self._offsets[at + 1]
        return Example(self._ids[begin:end], self._marks[begin:end])

    def label_roles(self) -> np.ndarray:
        """uint8 [num_labels]: the role of each label token, flat over all examples in order."""
        found = np.empty(self.num_labels, np.uint8)
        ends = np.cumsum(self.label_counts)
        for example, count, end in zip(self, self.label_counts, ends, strict=True):
            found[end - count : end] = example.roles[example.label_mask]
        return found

    def where(self, index: int) -> str:
        """File and line (or row number), counted from 1: "gsm8k_train.jsonl:17"."""
        return self._store.where(self._order[index])

    def files(self) -> tuple[list[tuple[int, str]], np.ndarray]:
        """(files, each once for each `data` that has it, as the number of that, counted from 0, and
        the name as in `where`; int64 [N]: which of them each example is from)."""
        numbers = {file: i for i, file in enumerate(dict.fromkeys(self._store.runs))}
        of_run = np.array([numbers[file] for file in self._store.runs], np.int64)
        return list(numbers), of_run[np.frombuffer(self._store.run, np.int32)][self._order]

    def max_id(self) -> int:
        """The largest token id, to ask whether a vocabulary has it; -1 where there is none."""
        return int(self._ids.max(initial=-1))


def load_examples(
    data: Sequence[str],
    tokenizer,
    options: TextOptions,
    *,
    context: int | None,
    data_weights: Sequence[float] | None = None,
) -> Examples:
    """Every row of every `data` as examples, in order; same input, same examples.

    context       longest sequence that the model takes; None where it has no limit
    data_weights  one per data: how often its examples count in an epoch. 2: twice; 0.5: a random
                  half, drawn with options.seed; 1.5: once, and a random half again

    Raises OptionError for options that contradict each other, DataError for a row that cannot be
    an example (by file and line), for sequences over the context and for no examples at all.
    """
    weights = list(data_weights) if data_weights is not None else [1.0] * len(data)
    _check(data, options, context, weights)
    loader, store = Loader(tokenizer, options, context), Store()
    parts = []
    with progress("tokenising", total=None, unit="rows") as advance:
        for number, (one, weight) in enumerate(zip(data, weights, strict=True)):
            begin = len(store)
            for batch in loader.read(one, advance):
                for encoded, row in batch:
                    store.add(encoded, row, number)
            parts.append(begin + _weighted(len(store) - begin, weight, [options.seed, number]))
    loader.refuse_unfit()
    order = np.concatenate(parts)
    if len(order) == 0:
        raise _nothing(data)
    examples = Examples(store, order, loader.report)
    loader.report.add(len(examples), examples.num_tokens, examples.num_labels)
    return examples


@dataclass(frozen=True, slots=True)
class Window:
    """Some of the examples, in order; their `report` is that of all that was read so far.

    last  there is no further window, and the report is complete. Where the last window is just
          full, that is not known yet, and False
    """

    examples: Examples
    last: bool


def load_windows(
    data: Sequence[str],
    tokenizer,
    options: TextOptions,
    *,
    context: int | None,
    data_weights: Sequence[float] | None = None,
    rows: int = WINDOW_ROWS,
    advance: Callable[[int], None] = lambda amount: None,
    owns: Callable[[np.ndarray], bool] | None = None,
) -> Iterator[Window]:
    """Every example that `load_examples` has, once each, in windows of `rows`; same order.

    Which of a dataset with a weight below 1 are drawn depends on how many there are, so such a
    dataset is read twice: first to count.

    advance  called after each batch of rows read, with their number; may raise to end the reading
    owns     of the input_ids: the windows hold only examples of which it is true, the report counts
             all. Where it is true of none, there is one window without an example

    Raises as load_examples does, the first unfit row behind the windows before it. A window with
    examples that `load_examples` would refuse is not given, nor is any after it: the rest is read
    for the counts in the message.
    """
    weights = list(data_weights) if data_weights is not None else [1.0] * len(data)
    _check(data, options, context, weights)
    loader, store = Loader(tokenizer, options, context, batch=rows), Store()
    given, most = False, min(max(rows, WINDOW_ROWS) * _ROW_TOKENS, _MOST_TOKENS)
    for number, (one, weight) in enumerate(zip(data, weights, strict=True)):
        seed = [options.seed, number]
        drawn = None  # all
        if weight < 1 and not loader.unfit:
            count = loader.count(one, advance)
            drawn = np.isin(np.arange(count), _weighted(count, weight, seed))
        tokens, labels = array("q"), array("q")  # of each example
        for batch in loader.read(one, advance):
            if loader.unfit:
                store = Store()
                continue
            for encoded, row in batch:
                tokens.append(len(encoded.input_ids))
                labels.append(int(encoded.label_mask.sum()))
                if drawn is None or drawn[len(tokens) - 1]:
                    if owns is None or owns(encoded.input_ids):
                        store.add(encoded, row, number)
                if len(store) >= rows or len(store.ids) >= most:
                    yield Window(Examples(store, np.arange(len(store)), loader.report), False)
                    given = True
                    store = Store()
        order = _weighted(len(tokens), weight, seed)
        totals = (int(np.frombuffer(x, np.int64)[order].sum()) for x in (tokens, labels))
        loader.report.add(len(order), *totals)
    loader.refuse_unfit()
    if loader.report.examples == 0:
        raise _nothing(data)
    if len(store) or not given:
        yield Window(Examples(store, np.arange(len(store)), loader.report), True)


def _check(
    data: Sequence[str], options: TextOptions, context: int | None, weights: list[float]
) -> None:
    if not data:
        raise OptionError("no data: name a file, a folder or a hub dataset with --data")
    if len(weights) != len(data):
        raise OptionError(
            f"{len(weights)} --data-weight for {len(data)} --data: give one for each, or none"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise OptionError(f"--data-weight {weight} should be a number above 0")
    if options.template not in (None, "chat", "plain"):
        raise OptionError(f"--template {options.template!r}: there are chat and plain")
    if options.labels not in ("responses", "all"):
        raise OptionError(f"--labels {options.labels!r}: there are responses and all")
    if options.on_empty not in ("drop", "error"):
        raise OptionError(f"--on-empty {options.on_empty!r}: there are drop and error")
    bounds = [("max-length", options.max_length, 2), ("limit", options.limit, 1)]
    for name, value, least in [*bounds, ("seed", options.seed, 0)]:
        if value is not None and value < least:
            raise OptionError(f"--{name} {value} should be {least} or more")
    if context is not None and (options.max_length or 0) > context:
        raise OptionError(
            f"--max-length {options.max_length} is over the model's context of {context} tokens: "
            f"use --max-length {context} or less"
        )


def _nothing(data: Sequence[str]) -> DataError:
    return DataError(
        f"no examples in {', '.join(data)}: the data weights leave none, or all were dropped"
    )


def _weighted(count: int, weight: float, seed: list[int]) -> np.ndarray:
    """int64: `count` examples floor(weight) times, then a random share of them for the rest."""
    everything = np.arange(count, dtype=np.int64)
    share = int((weight - math.floor(weight)) * count + 0.5)
    # RandomState, because its stream is the same in every version of numpy.
    some = np.random.RandomState(seed).permutation(count)[:share]
    return np.concatenate([everything] * math.floor(weight) + [np.sort(some)])
