"""A dataset's row -> what to encode; one small function per format, registered by decorator.

To add a format, write one function here and its section in docs/formats.md (a test asks for it).
Formats know columns and wording. They know no tokenizer and no file: errors raised here say what
is wrong with the row, and the caller adds where the row is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prift.errors import DataError, OptionError
from prift.text.messages import read_tools, read_turns, text


@dataclass(frozen=True, slots=True)
class Plain:
    """Text to continue, and the continuation, which is trained.

    `user` is what `--template chat` puts into the user's turn where that is not `prompt` itself;
    None where the row is no question (the format `text`).
    """

    prompt: str
    response: str
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages as chat templates take them, and of each whether its tokens are labels; None: only
    where prompts are trained too (--labels all)."""

    messages: list[dict]
    trained: list[bool | None]
    tools: list[dict] | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids that somebody else made; labels are -100 or the id itself."""

    input_ids: list[int]
    labels: list[int]


Item = Plain | Chat | Tokens


@dataclass(frozen=True, slots=True)
class Format:
    """A way to read rows: read(row) gives the Item, or raises DataError with what is wrong.

    columns  must all be there
    alone    auto takes the format only where all other columns are notes (id, url, ...)
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[dict], Item]
    alone: bool = False


FORMATS: dict[str, Format] = {}
_MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio", "pixel_values")
# Columns that describe a text without being part of what should be learnt.
_NOTES = {"id", "idx", "index", "uuid", "meta", "metadata", "source", "url", "date", "timestamp"}


def format(name: str, columns: tuple[str, ...], alone: bool = False):
    """Registers a function row -> Item under `--format name`."""

    def register(read: Callable[[dict], Item]) -> Callable[[dict], Item]:
        FORMATS[name] = Format(name, columns, read, alone)
        return read

    return register


def choose_format(name: str, columns: Iterable[str]) -> Format:
    """The format called `name`; for "auto", the only one whose columns are all among `columns`.

    Raises OptionError for an unknown name, DataError where none or several fit.
    """
    if name != "auto":
        if name not in FORMATS:
            raise OptionError(f"unknown --format {name!r}; there are auto, {', '.join(FORMATS)}")
        return FORMATS[name]
    found = list(columns)
    fitting = [one for one in FORMATS.values() if _fits(one, set(found))]
    if len(fitting) == 1:
        return fitting[0]
    wanted = "".join(f"\n  {one.name}: {_wants(one)}" for one in FORMATS.values())
    verdict = "no format fits"
    if fitting:
        verdict = f"several formats fit ({', '.join(one.name for one in fitting)})"
    raise DataError(
        f"{verdict} the columns found: {', '.join(found) or '(none)'}. Rename the columns, or name "
        f"the format with --format. Formats and the columns they want:{wanted}"
    )


def _fits(one: Format, columns: set[str]) -> bool:
    return columns.issuperset(one.columns) and not (
        one.alone and columns - set(one.columns) - _NOTES
    )


def _wants(one: Format) -> str:
    alone = " (chosen by auto only where no other column could hold text)" if one.alone else ""
    return ", ".join(one.columns) + alone


def read_row(one: Format, row: dict) -> Item:
    """The row as an Item. Raises DataError, without the row's place, for a row that is not one."""
    missing = [column for column in one.columns if row.get(column) is None]
    if missing:
        raise DataError(
            f"no {' and no '.join(repr(column) for column in missing)} here: columns found: "
            f"{', '.join(row) or '(none)'}; the format {one.name} wants {', '.join(one.columns)}"
        )
    for column in _MEDIA_COLUMNS:
        if row.get(column):
            raise DataError(f"the row carries {column!r}; prift trains on text alone")
    return one.read(row)


@format("prompt-completion", columns=("prompt", "completion"))
def prompt_completion(row: dict) -> Item:
    """Two strings, or two lists of messages (as TRL has them) of which the second is trained."""
    return _pair(row, "completion")


@format("prompt-response", columns=("prompt", "response"))
def prompt_response(row: dict) -> Item:
    """As prompt-completion, under the other common name."""
    return _pair(row, "response")


def _pair(row: dict, column: str) -> Item:
    if not isinstance(row["prompt"], list):
        prompt = text(row["prompt"], "'prompt'")
        return Plain(prompt, text(row[column], repr(column)), user=prompt)
    before, given = read_turns(row["prompt"], "prompt")
    after, trained = read_turns(row[column], column)
    given = [False if one is False else None for one in given]
    return Chat(before + after, given + trained, read_tools(row.get("tools")))


@format("question-answer", columns=("question", "answer"))
def question_answer(row: dict) -> Item:
    """The question on a line of its own, then the answer."""
    question = text(row["question"], "'question'")
    return Plain(f"{question}\n", text(row["answer"], "'answer'"), user=question)


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@format("alpaca", columns=("instruction", "output"))
def alpaca(row: dict) -> Item:
    """instruction, output and perhaps input, in Stanford Alpaca's wording."""
    for column in ("history", "system"):
        if row.get(column):
            raise DataError(f"the format alpaca has no place for {column!r}; use messages instead")
    fields = {"instruction": text(row["instruction"], "'instruction'")}
    response = text(row["output"], "'output'")
    if not row.get("input"):
        return Plain(ALPACA.format(**fields), response, user=fields["instruction"])
    fields["input"] = text(row["input"], "'input'")
    user = f"{fields['instruction']}\n\n{fields['input']}"
    return Plain(ALPACA_INPUT.format(**fields), response, user=user)


@format("text", columns=("text",), alone=True)
def whole_text(row: dict) -> Item:
    """One string, all of it trained."""
    return Plain("", text(row["text"], "'text'"))


@format("messages", columns=("messages",))
def messages(row: dict) -> Item:
    """role and content, content a string or a list of typed parts."""
    return _conversation(row, "messages")


@format("sharegpt", columns=("conversations",))
def sharegpt(row: dict) -> Item:
    """from and value, with the roles human, gpt, function_call, observation and their kin."""
    return _conversation(row, "conversations")


def _conversation(row: dict, column: str) -> Chat:
    turns, trained = read_turns(row[column], column)
    if row.get("system"):
        if turns[0]["role"] == "system":
            raise DataError("it has both a 'system' column and a system turn; keep one of them")
        turns.insert(0, {"role": "system", "content": text(row["system"], "'system'")})
        trained.insert(0, None)
    return Chat(turns, trained, read_tools(row.get("tools")))


@format("tokens", columns=("input_ids", "labels"))
def tokens(row: dict) -> Item:
    """Ids and labels made elsewhere; nothing is added to them, padding on the right is cut off."""
    ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    mask = _integers(row, "attention_mask") or [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise DataError(
            f"{len(ids)} input_ids, {len(labels)} labels and an attention_mask of {len(mask)} "
            "should be equally many"
        )
    length = sum(mask) if set(mask) <= {0, 1} else -1
    if mask != [1] * length + [0] * (len(mask) - length):
        raise DataError(
            "attention_mask has holes (or padding on the left); the prior sees the ids alone"
        )
    places = _integers(row, "position_ids") or list(range(len(ids)))
    if places[:length] != list(range(length)):
        raise DataError("it has its own position_ids; the prior sees the ids alone, counted from 0")
    for place, (one, label) in enumerate(zip(ids, labels, strict=True)):
        if not 0 <= one < 2**31:
            raise DataError(f"input_ids[{place}] is {one!r}, which is no token id")
        if label != -100 and (label != one or place >= length):
            raise DataError(
                f"labels[{place}] is {label!r} where the token is {one}; a label is its token or "
                "-100"
            )
    return Tokens(ids[:length], labels[:length])


def _integers(row: dict, column: str) -> list[int]:
    """A column that holds one list of whole numbers; empty where it is absent or null."""
    value = row.get(column)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(type(one) is int for one in value):
        raise DataError(
            f"{column} is {str(value)[:60]}, where a list of whole numbers is wanted (one "
            "sequence a row, not a batch of them)"
        )
    return list(value)
