"""Conversations whose every turn is trained (--labels all): where each ends in a templated text.

A turn ends where the conversation up to it does, as rendered by itself. Where a template renders it
otherwise later on, it ends behind the last end-of-turn in front of the next turn's content, which
is as far as two renderings agree that differ in that content alone.
"""

import os
from dataclasses import dataclass
from typing import Any

from prift.errors import DataError
from prift.roles import ASSISTANT, PROMPT, ROLES
from prift.text.formats import Chat

_OTHER = "\x01prift puts this in the place of a turn"


@dataclass(frozen=True)
class Whole:
    """The text of the messages up to `last`.

    template  a chat.Template
    chat      its messages as the template takes them
    spans     the assistant's own words, of the messages where they are known
    """

    template: Any
    chat: Chat
    text: str
    last: int
    spans: dict[int, tuple[int, int]]

    def behind(self, turn: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(trained, roles), as encode.Rendering has them, of all behind a message; -1: of all.

        Turns that the row itself bars from training are not trained. Raises DataError where they
        cannot be told.
        """
        at = 0 if turn < 0 else self._seam(turn)
        if at is None:
            raise _unknown(turn)
        trained, roles = [], []
        for number in range(turn + 1, self.last + 1):
            end, barred = self._end(number), self.chat.trained[number] is False
            if end is None or end <= at:  # written inside another turn, as a system message may be
                if barred:
                    raise _unknown(number)
                continue
            begin, stop, role = at, end, ROLES.index(self.chat.messages[number]["role"])
            if role == ASSISTANT:
                begin, stop = self.spans.get(number) or self._spoken(number, end)
            roles += [(at, PROMPT), (begin, role), (stop, PROMPT)]
            trained += [(at, begin), (stop, end)] if barred else [(at, end)]
            at = end
        return _joined([*trained, (at, len(self.text))]), roles

    def _seam(self, turn: int) -> int | None:
        """Where a message ends with the white space that its own text ended in, which was trained
        there; None where it cannot be told."""
        end, own = self._end(turn), self._rendered(self.chat.messages[: turn + 1])
        if end is None or own is None:
            return end
        space = own[len(own.rstrip()) :]
        trained = self.text[:end].endswith(space) or not self.text.startswith(space, end)
        return end if trained else end + len(space)

    def _end(self, turn: int) -> int | None:
        """Where a message's text ends; None where it cannot be told."""
        if turn == self.last:
            return len(self.text)
        alone = self._rendered(self.chat.messages[: turn + 1])
        if alone is not None and self.text.startswith(alone):
            return len(alone)
        following = {**self.chat.messages[turn + 1], "content": _OTHER}
        other = self._rendered([*self.chat.messages[: turn + 1], following])
        if other is None:
            return None
        header = os.path.commonprefix([self.text, other])
        closing = self.template.end_of_turn or ""
        at = header.rfind(closing)
        return len(header) if at < 0 else at + len(closing)

    def _spoken(self, turn: int, end: int) -> tuple[int, int]:
        """The words of an assistant's turn that is not trained."""
        header = self.template.header
        if turn:
            opened = self._rendered(self.chat.messages[:turn], generation_prompt=True)
        else:  # no template renders an empty conversation
            opened = "".join(self.text.partition(header)[:2]) if header else None
        if opened is None or not self.text.startswith(opened) or len(opened) > end:
            raise _unknown(turn)
        return len(opened), self.template.close(self.text, len(opened), end)

    def _rendered(self, messages: list[dict], **options: bool) -> str | None:
        try:
            return self.template.render(messages, self.chat.tools, **options)
        except DataError:  # a template may refuse a conversation that ends there
            return None


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without empty ones, and those that touch as one: a token may lie across their edge."""
    found: list[tuple[int, int]] = []
    for begin, end in spans:
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        if begin < end:
            found.append((begin, end))
    return found


def _unknown(turn: int) -> DataError:
    return DataError(
        f"turn {turn + 1}: where it begins and ends in what the chat template writes cannot be "
        "told, which --labels all needs. Give another template with --chat-template FILE, or train "
        "on responses alone"
    )
