"""Threads beside the main one: `Prefetch` makes items ahead of it, `Consumer` takes them off it.

Both are context managers, and their thread has ended when the block is left, however it is left.
An interrupt (Ctrl-C) may strike the main thread anywhere, so a thread never waits for good: it
looks up every so often whether it is still wanted. Nor does the main thread take a lock in Python
(queue.Queue, threading.Event): struck between taking it and the block that gives it back, it would
keep it for ever. SimpleQueue and sleep are C, which an interrupt finds before or after.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_END = object()
_LOOK_SECONDS = 0.05
_PAUSE_SECONDS = 0.002  # between two looks at a queue that is full, or a thread that is to end
_SWITCH_SECONDS = 1e-4
"""How long a thread that computes in Python may keep the interpreter while another waits for it.
With Python's own 5 ms, the many short calls that feed a device take ten times as long or more
while a tokenising thread runs (measured: 3 microseconds become 218; with this, 6)."""


class Abandoned(Exception):
    """Raised in a thread whose items nobody wants any more."""


class _Beside:
    """A thread that runs `_run`, and ends soon once `_left` is True."""

    def __init__(self) -> None:
        self._left = False
        self._over = False
        self._thread: threading.Thread | None = None

    def _run(self, *args: Any) -> None:
        raise NotImplementedError

    def _begin(self, name: str, *args: Any) -> None:
        thread = threading.Thread(target=self._whole, args=args, name=f"prift-{name}")
        try:
            thread.start()
        except BaseException:  # an interrupt, and whether the thread runs by now is not known
            self._left = True
            time.sleep(1)
            raise
        self._thread = thread

    def _whole(self, *args: Any) -> None:
        try:
            self._run(*args)
        except Abandoned:
            pass
        finally:
            self._over = True

    def _unwanted(self) -> bool:
        return self._left or not threading.main_thread().is_alive()

    def _end(self) -> None:
        """Waits for the thread, however often an interrupt comes: each calls `_hurry`, and the
        last is raised in the end. Not by Thread.join alone, which takes a thread for ended once it
        was interrupted (Python 3.11)."""
        self._left = True
        interrupt = None
        while self._thread is not None and not self._over:
            try:
                time.sleep(_PAUSE_SECONDS)
            except KeyboardInterrupt as error:
                interrupt = error
                self._hurry()
        if self._thread is not None:
            self._thread.join()
        if interrupt is not None:
            raise interrupt

    def _hurry(self) -> None:
        pass


class Prefetch(_Beside, Generic[T]):
    """Items of an iterator, made in a thread of its own, `depth` of them waiting at most.

    with Prefetch(2) as ahead:
        for item in ahead.start(items(ahead.check)):
            ...

    An exception of the iterator is raised where its item would have come: behind those before.
    Leaving waits for the thread, which looks between two items whether it is still wanted; an
    iterator whose items take long calls `check` now and then.
    """

    def __init__(self, depth: int):
        super().__init__()
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._depth = depth
        self._interval = sys.getswitchinterval()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def start(self, source: Iterator[T]) -> Iterator[T]:
        """The items of `source`, which belongs to the thread from now on. Call it once."""
        sys.setswitchinterval(min(_SWITCH_SECONDS, self._interval))
        self._begin("prefetch", source)
        return _Taken(self._items)

    def check(self) -> None:
        """Raises Abandoned if the block was left."""
        if self._unwanted():
            raise Abandoned

    def _run(self, source: Iterator[T]) -> None:
        try:
            while True:
                self.check()
                self._give((next(source), None))  # no name here: an item given is forgotten
        except StopIteration:
            self._give((_END, None))
        except Abandoned:
            raise
        except BaseException as error:
            self._give((_END, error))

    def _give(self, item: tuple) -> None:
        self.check()
        while self._items.qsize() >= self._depth:
            time.sleep(_PAUSE_SECONDS)
            self.check()
        self._items.put(item)

    def __exit__(self, *_: Any) -> None:
        sys.setswitchinterval(self._interval)
        self._end()


class _Taken(Iterator[T]):
    """What waits in the queue, up to the end or the error that was put there."""

    def __init__(self, items: queue.SimpleQueue):
        self._items, self._over = items, False

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        item, error = self._items.get()
        if item is not _END:
            return item
        self._over = True
        raise error or StopIteration


class Consumer(_Beside, Generic[T]):
    """Calls `handle(item)` in a thread for each item put, in order; at most `depth` of them wait.

    with Consumer(handle, 100) as consumer:
        consumer.put(item)

    An exception of `handle` is raised by the next `put`, or on leaving; what was put behind its
    item is dropped. Leaving, by an exception too, waits until all that was put is handled, and so
    does an interrupt meanwhile; only a second one, that which left the block counted, drops what is
    not begun.
    """

    def __init__(self, handle: Callable[[T], None], depth: int):
        super().__init__()
        self._handle = handle
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._depth = depth
        self._error: BaseException | None = None
        self._interrupts = 0

    def __enter__(self) -> "Consumer[T]":
        return self

    def put(self, item: T) -> None:
        """Waits where `depth` items wait already. Raises what `handle` raised."""
        if self._thread is None:  # not on entering: an interrupt there would leave it running
            self._begin("consumer")
        if self._error is not None:
            raise self._error
        while self._items.qsize() >= self._depth:
            time.sleep(_PAUSE_SECONDS)
        self._items.put(item)

    def _run(self) -> None:
        while True:
            last = self._unwanted()  # asked before the queue is found empty
            try:
                item = self._items.get(timeout=0 if last else _LOOK_SECONDS)
            except queue.Empty:
                if last:
                    return
                continue
            if self._error is None and self._interrupts < 2:
                try:
                    self._handle(item)
                except BaseException as error:
                    self._error = error
            del item

    def _hurry(self) -> None:
        self._interrupts += 1

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._hurry()
        self._end()
        if self._error is not None and self._error is not error:
            raise self._error
