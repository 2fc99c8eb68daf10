"""Rows -> token sequences; the steps that every `--data` goes through, a batch of rows at a time.

1. read rows (rows.py)                  3. row -> text -> ids, in batches (encode.py, chat.py)
2. choose the format by the first row   4. cut at max_length; drop, count or refuse what is unfit
"""

import itertools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prift.errors import DataError, OptionError
from prift.text.chat import Template, render_chat, with_system
from prift.text.encode import Encoded, encode_plain, encode_renderings, encode_tokens
from prift.text.formats import Chat, Format, Item, Plain, Tokens, choose_format, read_row
from prift.text.report import Report, some
from prift.text.rows import Row, read_rows
from prift.text.tokenizers import Codec

_BATCH = 512  # rows tokenised at once: enough to fill the cores, little enough to keep memory flat


@dataclass(frozen=True)
class TextOptions:
    """What decides the text, beside data and tokenizer; the options of both commands.

    format      a name in FORMATS, or "auto"
    labels      "responses", or "all": whether what is given to the model is trained too
    template    "chat", "plain", or None: as the format has it
    system      system message for conversations without one
    max_length  longest sequence in tokens; longer ones are cut at the right
    on_empty    what happens to an example that the cut leaves without a label: "drop" or "error"
    split       split of a folder or hub dataset
    limit       first rows of each --data
    seed        of the random part that a fractional data weight takes
    """

    format: str = "auto"
    labels: str = "responses"
    template: str | None = None
    system: str | None = None
    max_length: int | None = None
    on_empty: str = "drop"
    split: str | None = None
    limit: int | None = None
    seed: int = 0


class Store:
    """Growing flat arrays: examples in the order of reading, each once.

    marks   one byte a token: twice its role, and 1 more where it is a label
    labels  label tokens of each example
    runs    of examples from one file: (number of its --data, counted from 0; its name)
    run     which of them each example is in
    """

    def __init__(self) -> None:
        self.ids, self.marks, self.offsets = array("i"), bytearray(), array("q", [0])
        self.labels = array("q")
        self.runs: list[tuple[int, str]] = []
        self.run, self.line = array("i"), array("q")

    def __len__(self) -> int:
        return len(self.line)

    def add(self, encoded: Encoded, row: Row, dataset: int) -> None:
        self.ids.frombytes(encoded.input_ids.tobytes())
        self.marks += (encoded.roles << 1 | encoded.label_mask).tobytes()
        self.offsets.append(len(self.ids))
        self.labels.append(int(encoded.label_mask.sum()))
        if not self.runs or self.runs[-1] != (dataset, row.file):
            self.runs.append((dataset, row.file))
        self.run.append(len(self.runs) - 1)
        self.line.append(row.line)

    def where(self, at: int) -> str:
        return f"{self.runs[self.run[at]][1]}:{self.line[at]}"


class Loader:
    """Reads one `--data` after the other, and counts into `report`.

    batch  rows tokenised at once, at most
    codec  of the tokenizer, where there is one already
    """

    def __init__(
        self,
        tokenizer,
        options: TextOptions,
        context: int | None,
        batch: int = _BATCH,
        codec: Codec | None = None,
    ) -> None:
        self.report = Report()
        self._tokenizer = tokenizer
        self._codec = codec or Codec(tokenizer)
        self._options, self._everything = options, options.labels == "all"
        self._context = context
        self._batch = min(batch, _BATCH)
        self._template: Template | None = None
        self._unlabelled: list[str] = []
        self._too_long: list[str] = []
        self._longest = 0
        self.report.no_eos = self._codec.eos is None

    def read(
        self, data: str, advance: Callable[[int], None]
    ) -> Iterator[list[tuple[Encoded, Row]]]:
        """The examples of one dataset, those of a batch of rows at a time, in order.

        advance  called with the number of rows behind each batch
        Raises DataError or OptionError for the first row that is unfit to be read; rows that are
        read but cannot be trained on are noted for `refuse_unfit`.
        """
        rows = itertools.islice(read_rows(data, self._options.split), self._options.limit)
        first = next(rows, None)
        if first is None:
            raise DataError(f"--data {data} holds no rows")
        chosen = self._choose(first)
        rows = itertools.chain([first], rows)
        while batch := list(itertools.islice(rows, self._batch)):
            items = [self._item(chosen, row) for row in batch]
            self.report.formats.setdefault(data, _described(chosen, items[0]))
            encoded = zip(batch, self._encode(batch, items), strict=True)
            kept = [self._kept(one, row) for row, sequences in encoded for one in sequences]
            self.report.rows += len(batch)
            advance(len(batch))
            yield [pair for pair in kept if pair is not None]

    def count(self, data: str, advance: Callable[[int], None]) -> int:
        """How many examples `read` will give; counts nothing into `report`."""
        other = Loader(self._tokenizer, self._options, self._context, self._batch, self._codec)
        return sum(len(kept) for kept in other.read(data, advance))

    def _choose(self, first: Row) -> Format:
        try:
            return choose_format(self._options.format, first.data)
        except DataError as error:
            raise DataError(f"{first.where}: {error}") from error

    def _item(self, chosen: Format, row: Row) -> Item:
        try:
            return self._templated(read_row(chosen, row.data), chosen.name)
        except (DataError, OptionError) as error:
            raise type(error)(f"{row.where}: {error}") from error

    def _templated(self, item: Item, name: str) -> Item:
        """The item as --template and --system want it."""
        template, system = self._options.template, self._options.system
        if template == "chat" and isinstance(item, Plain) and item.user is not None:
            turns = [("user", item.user), ("assistant", item.response)]
            messages = [{"role": role, "content": content} for role, content in turns]
            item = Chat(messages, [None, True])
        kind = "chat" if isinstance(item, Chat) else "plain"
        if template is not None and (template != kind or isinstance(item, Tokens)):
            raise OptionError(f"--template {template} cannot be had for the format {name}")
        if isinstance(item, Chat):
            return with_system(item, system)
        if system is not None:
            raise OptionError(
                f"--system needs a chat template, but the format {name} is encoded without one: "
                "add --template chat, or put the system text into the prompts"
            )
        return item

    def _encode(self, rows: list[Row], items: list[Item]) -> list[list[Encoded]]:
        """The sequences of each item: one, or several for a conversation that had to be split."""
        plain = [item for item in items if isinstance(item, Plain)]
        encoded_plain = iter(encode_plain(plain, self._codec, self._everything) if plain else [])
        rendered = [
            self._render(row, item) if isinstance(item, Chat) else []
            for row, item in zip(rows, items, strict=True)
        ]
        texts = list(itertools.chain.from_iterable(rendered))
        encoded_chat = iter(encode_renderings(texts, self._codec) if texts else [])
        sequences = []
        for item, renderings in zip(items, rendered, strict=True):
            if isinstance(item, Plain):
                sequences.append([next(encoded_plain)])
            elif isinstance(item, Tokens):
                sequences.append([encode_tokens(item, self._everything)])
            else:
                sequences.append([next(encoded_chat) for _ in renderings])
        return sequences

    def _render(self, row: Row, chat: Chat) -> list:
        if not any(one or (one is None and self._everything) for one in chat.trained):
            self._unlabelled.append(row.where)
            return []
        try:
            self._template = self._template or Template(self._tokenizer)
            rendered = render_chat(chat, self._template, self._everything)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        self.report.split += rendered.split
        self.report.unseen_reasoning += "reasoning" in rendered.unseen
        self.report.unseen_tools += "tools" in rendered.unseen
        return rendered.renderings

    def _kept(self, encoded: Encoded, row: Row) -> tuple[Encoded, Row] | None:
        """The sequence, cut; None where it is no example, and then why is noted."""
        limit = self._options.max_length
        self.report.straddled += encoded.straddled
        if not encoded.label_mask.any():
            self._unlabelled.append(row.where)
            return None
        if limit is not None and len(encoded.input_ids) > limit:
            self.report.truncated += 1
            encoded = encoded.cut(limit)
            if not encoded.label_mask.any():
                self.report.dropped.append(row.where)
                return None
        if self._context is not None and len(encoded.input_ids) > self._context:
            self._too_long.append(row.where)
            self._longest = max(self._longest, len(encoded.input_ids))
        return encoded, row

    @property
    def unfit(self) -> bool:
        """Whether `refuse_unfit` would raise."""
        empty = self.report.dropped and self._options.on_empty == "error"
        return bool(self._unlabelled or self._too_long or empty)

    def refuse_unfit(self) -> None:
        """Raises DataError for rows without labels, sequences over the context, and, with
        on_empty="error", examples that the cut left without a label."""
        if self._unlabelled:
            raise DataError(
                f"{len(self._unlabelled):,} of {self.report.rows:,} rows have no token to train on "
                "(an empty response, or no trained assistant turn): "
                f"{some(self._unlabelled)}. Mend or remove them"
            )
        if self._too_long:
            raise DataError(
                f"longer than the model's context of {self._context} tokens: "
                f"{len(self._too_long):,} sequence(s), the longest has {self._longest:,}: "
                f"{some(self._too_long)}. Cut them with --max-length {self._context}"
            )
        if self.report.dropped and self._options.on_empty == "error":
            raise DataError(
                f"--max-length {self._options.max_length} leaves {len(self.report.dropped):,} "
                f"examples without a label: {some(self.report.dropped)}. Raise --max-length, or "
                "drop them with --on-empty drop"
            )


def _described(chosen: Format, item: Item) -> str:
    if isinstance(item, Tokens):
        return chosen.name
    return f"{chosen.name}, {'chat template' if isinstance(item, Chat) else 'plain'}"
