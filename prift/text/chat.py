"""Conversations -> templated text, with the characters that are trained.

A turn's boundaries come from the template's generation marks, or from rendering prefixes of the
conversation. Each prefix must be a text prefix of the whole. Templates that drop earlier reasoning
break this; then every trained turn becomes an example of its own, cut behind that turn, which is
what the model sees when it generates that turn; and where every turn is trained, what is behind the
last of them one more.
"""

import datetime
import re
from dataclasses import dataclass, field, replace

from prift.errors import DataError
from prift.roles import ASSISTANT, PROMPT
from prift.text.encode import Rendering
from prift.text.formats import Chat
from prift.text.whole import Whole

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "prift probes the end of this turn"


@dataclass(frozen=True, slots=True)
class Rendered:
    """One conversation. `unseen` names what the template left out: "reasoning", "tools"."""

    renderings: list[Rendering]
    split: bool = False
    unseen: frozenset[str] = field(default_factory=frozenset)


class Template:
    """A tokenizer's chat template, and where in its text a turn begins and ends.

    end_of_turn  what it writes behind an assistant's content, the white space after it left out
                 (unless there is nothing else): "<|im_end|>"; None where it could not be told
    header       what it writes to let the assistant speak: "<|im_start|>assistant\\n"
    """

    def __init__(self, tokenizer) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template, which messages "
                "need: give one with --chat-template FILE, or name a tokenizer that has one with "
                "--tokenizer"
            )
        self.tokenizer = tokenizer
        self.end_of_turn, self.header = self._probe()

    def _probe(self) -> tuple[str | None, str]:
        asked = [{"role": "user", "content": "Hello"}]
        answered = [*asked, {"role": "assistant", "content": _PROBE}]
        try:
            text, prompt = self.render(answered), self.render(asked)
            opened = self.render(asked, generation_prompt=True)
        except DataError:
            return None, ""
        header = opened.removeprefix(prompt) if opened.startswith(prompt) else ""
        closing = text.rpartition(_PROBE)[2] if _PROBE in text else None
        return closing and (closing.rstrip() or closing), header

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, generation_prompt=False
    ) -> str:
        """The template's text. Raises DataError with the template's own complaint."""
        return self._render(messages, tools, add_generation_prompt=generation_prompt)[0]

    def render_marked(
        self, messages: list[dict], tools: list[dict] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and its {% generation %} spans; no spans where the template has no marks."""
        template = self.tokenizer.get_chat_template(tools=tools)
        if not _MARKS.search(template):
            return self.render(messages, tools), []
        return self._render(messages, tools, return_assistant_tokens_mask=True)

    def _render(self, messages, tools, **options) -> tuple[str, list[tuple[int, int]]]:
        # apply_chat_template hides the marks' characters behind a token mask that counts tokens
        # across the edge as inside, so this calls what it calls.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(tools=tools),
                strftime_now=_one_date,
                **options,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"the chat template cannot render this: {error}") from error
        return texts[0], [tuple(mark) for mark in marks[0]] if marks else []

    def close(self, text: str, begin: int, end: int) -> int:
        """The end of a trained span: behind the end-of-turn token, before the newline after it."""
        closing = self.end_of_turn
        if closing and not closing.strip():
            reached = text[begin:end].endswith(closing)
            return end + len(closing) if not reached and text.startswith(closing, end) else end
        inner = text[begin:end].rstrip()
        if closing and not inner.endswith(closing) and text.startswith(closing, end):
            return end + len(closing)
        return end if closing == "" else begin + len(inner)


def _one_date(format: str) -> str:
    """What templates get that ask for today's date (Llama 3's and gpt-oss's do).

    With the true date, statistics computed today would fit no example tomorrow.
    """
    return datetime.date(2025, 1, 1).strftime(format)


def with_system(chat: Chat, system: str | None) -> Chat:
    """The conversation with `system` in front, where it has no system message of its own."""
    if system is None or any(message["role"] == "system" for message in chat.messages):
        return chat
    first = {"role": "system", "content": system}
    return Chat([first, *chat.messages], [None, *chat.trained], chat.tools)


def render_chat(chat: Chat, template: Template, everything: bool = False) -> Rendered:
    """The conversation's text or texts, and what of them is trained.

    everything  every turn is, and what the template writes, but not what the row bars. Each once:
                where there are several texts, in the first that has it

    Raises DataError where the template refuses the conversation, writes a turn in a way that its
    own generation prompt cannot lead to, or loses a trained turn's tool calls.
    """
    messages = [_for_template(message) for message in chat.messages]
    turns = [i for i, trained in enumerate(chat.trained) if trained]
    for i in turns:
        if not any(messages[i].get(key) for key in ("content", "reasoning_content", "tool_calls")):
            raise DataError(f"turn {i + 1} is a trained assistant turn with nothing in it")
    whole, marks = template.render_marked(messages, chat.tools)
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if marks and len(marks) == len(assistants):
        spans = {i: mark for i, mark in zip(assistants, marks, strict=True) if i in turns}
    else:
        spans = {i: _prefix_span(i, messages, chat, template, whole) for i in turns}
    end = len(messages) - 1
    if None not in spans.values():
        return _rendered([(whole, end, spans)], chat, template, everything)
    parts = []
    for i in turns:
        text = template.render(messages[: i + 1], chat.tools)
        span = _prefix_span(i, messages, chat, template, text)
        if span is None:
            raise DataError(
                f"turn {i + 1}: what the chat template writes to let the assistant speak is no "
                "prefix of what it writes for the finished turn, so the turn's tokens cannot be "
                "told. Give a template with {% generation %} marks with --chat-template FILE"
            )
        parts.append((text, i, {i: span}))
    if everything and turns[-1] < end:  # what nobody answers, or an answer that the row bars
        parts.append((whole, end, {}))
    return replace(_rendered(parts, chat, template, everything), split=True)


def _for_template(message: dict) -> dict:
    """gpt-oss's template, and those made like it, read `thinking` for `reasoning_content`."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {**message, "thinking": reasoning}


def _prefix_span(
    turn: int, messages: list[dict], chat: Chat, template: Template, whole: str
) -> tuple[int, int] | None:
    """The characters of a turn in `whole`; None where its prefixes are no text prefixes of it."""
    end = template.render(messages[: turn + 1], chat.tools)
    if turn > 0:
        begin = template.render(messages[:turn], chat.tools, generation_prompt=True)
    elif template.header and template.header in end:
        # No template renders an empty conversation, but the header shows where its turn begins.
        begin = end[: end.index(template.header) + len(template.header)]
    else:
        return None
    if not whole.startswith(end) or not end.startswith(begin):
        return None
    return len(begin), len(end)


def _rendered(
    parts: list[tuple[str, int, dict[int, tuple[int, int]]]],
    chat: Chat,
    template: Template,
    everything: bool,
) -> Rendered:
    """Of each part: its text, its last message and the characters of its trained turns."""
    renderings, unseen, before = [], set(), -1
    whole = replace(chat, messages=[_for_template(message) for message in chat.messages])
    for text, last, spans in parts:
        spans = {i: (begin, template.close(text, begin, end)) for i, (begin, end) in spans.items()}
        for i, (begin, end) in spans.items():
            unseen |= _unseen(chat.messages[i], i, text[begin:end])
        unseen |= {"tools"} if any(_name(tool) not in text for tool in chat.tools or []) else set()
        trained = list(spans.values())
        add_eos = template.end_of_turn == "" and bool(trained) and trained[-1][1] == len(text)
        roles = [edge for begin, end in trained for edge in ((begin, ASSISTANT), (end, PROMPT))]
        if everything:
            trained, roles = Whole(template, whole, text, last, spans).behind(before)
            before = last
        renderings.append(Rendering(text, trained, roles, add_eos))
    return Rendered(renderings, unseen=frozenset(unseen))


def _unseen(message: dict, turn: int, text: str) -> set[str]:
    for call in message.get("tool_calls", []):
        if _name(call) not in text:
            raise DataError(
                f"turn {turn + 1} calls the tool {_name(call)!r}, but the chat template does not "
                "render tool calls: give one that does with --chat-template FILE"
            )
    reasoning = message.get("reasoning_content", "").strip()
    return {"reasoning"} if reasoning and reasoning not in text else set()


def _name(tool: dict) -> str:
    return str(tool["function"].get("name", ""))
