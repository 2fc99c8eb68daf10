"""SIGINT (Ctrl-C) and SIGTERM: as a request that work answers when it can, or as an exception."""

import os
import signal
import threading
from types import FrameType
from typing import Any

_HEARD = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Inside `with`, the first signal is kept in `received`; a second Ctrl-C ends at once.

    answer  what is said on stderr when the first one comes; "" = nothing
    """

    def __init__(self, answer: str = ""):
        self.received = 0
        self._answer = answer
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._handle) for number in _HEARD}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            if self._answer:  # past sys.stderr, which may be in the middle of a write
                os.write(2, f"{signal.Signals(number).name}: {self._answer}\n".encode())
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


class Stopped(KeyboardInterrupt):
    """A signal, raised where the main thread was. `signal` is its number."""

    def __init__(self, signal: int):
        super().__init__()
        self.signal = signal


def interrupt_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that an error is, or has become: where one strikes between two steps of a lock
    of Python's own, leaving that raises a RuntimeError."""
    while isinstance(error, RuntimeError):
        error = error.__context__
    return error if isinstance(error, KeyboardInterrupt) else None


class Stopping(Signals):
    """Inside `with`, the first signal raises Stopped in the main thread, as Ctrl-C raises
    KeyboardInterrupt, and Stopped is what leaves; a second one ends the process at once, with 128 +
    its number."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        stop = interrupt_in(error)
        if stop is not None and stop is not error:
            raise stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        super()._handle(number, frame)
        raise Stopped(number)
