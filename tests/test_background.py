"""The two helpers with threads: order, bounds, errors, and that no thread outlives its block."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from prift.background import Abandoned, Consumer, Prefetch

SOON = 10.0


def until(condition) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before, interval = set(threading.enumerate()), sys.getswitchinterval()
    yield
    assert set(threading.enumerate()) == before
    assert sys.getswitchinterval() == interval


class Item:
    """Something a weak reference can watch."""


def test_items_come_in_order_from_another_thread():
    makers = set()

    def items():
        for n in range(100):
            makers.add(threading.current_thread())
            yield n

    with Prefetch(2) as ahead:
        taken = ahead.start(items())
        assert list(taken) == list(range(100))
        assert list(taken) == []
    assert len(makers) == 1 and threading.current_thread() not in makers


def test_no_more_than_the_depth_waits():
    made = []
    with Prefetch(2) as ahead:
        taken = ahead.start(made.append(n) or n for n in range(100))
        for n in range(10):
            assert next(taken) == n
            until(lambda n=n: len(made) == n + 4)  # taken, two that wait, and one that has to
            time.sleep(0.002)
            assert len(made) == n + 4


def test_an_error_comes_behind_the_items_before_it():
    def items():
        yield from range(3)
        raise LookupError("the fourth")

    seen = []
    with pytest.raises(LookupError, match="the fourth"), Prefetch(1) as ahead:
        for n in ahead.start(items()):
            seen.append(n)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_early_ends_a_thread_that_waits_to_give(error):
    def items():
        while True:
            yield Item()

    with pytest.raises(error), Prefetch(1) as ahead:
        next(ahead.start(items()))
        raise error


def test_leaving_early_ends_an_iterator_that_checks():
    """It would never come to its first item."""
    began, ended = threading.Event(), []

    def items(check):
        try:
            while True:
                began.set()
                check()
                time.sleep(0.001)
        except Abandoned:
            ended.append(True)
            raise
        yield

    with pytest.raises(KeyboardInterrupt), Prefetch(1) as ahead:
        ahead.start(items(ahead.check))
        assert began.wait(SOON)
        signal.raise_signal(signal.SIGINT)
    assert ended == [True]


def test_what_was_given_is_not_held():
    born = []

    def items():
        for _ in range(5):
            born.append(weakref.ref(item := Item()))
            yield item
            del item

    with Prefetch(1) as ahead:
        for item in ahead.start(map(lambda x: x, items())):
            del item
            until(lambda: len(born) == 5 or sum(ref() is not None for ref in born) <= 3)
        until(lambda: not any(ref() for ref in born))


def test_a_block_that_starts_nothing():
    with Prefetch(1) as ahead:
        ahead.check()
    with pytest.raises(Abandoned):
        ahead.check()


def test_everything_put_is_handled_in_order_elsewhere():
    seen = []
    with Consumer(lambda n: seen.append((n, threading.current_thread())), 3) as consumer:
        for n in range(100):
            consumer.put(n)
    assert [n for n, _ in seen] == list(range(100))
    assert {thread for _, thread in seen}.isdisjoint(threading.enumerate())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_put_before_an_error_of_the_block_is_handled(error):
    seen = []

    def slow(n):
        time.sleep(0.001)
        seen.append(n)

    with pytest.raises(error), Consumer(slow, 100) as consumer:
        for n in range(50):
            consumer.put(n)
        raise error
    assert seen == list(range(50))


def fail_at(seen, bad):
    def handle(n):
        if n == bad:
            raise OSError("full")
        seen.append(n)

    return handle


def test_an_error_of_the_consumer_is_raised_by_the_next_put():
    seen, put = [], []
    with pytest.raises(OSError, match="full"), Consumer(fail_at(seen, 3), 2) as consumer:
        for n in range(1000):
            consumer.put(n)
            put.append(n)
    assert seen == [0, 1, 2]
    assert len(put) <= 3 + 1 + 2 + 1  # the bad one, what waited behind it, one on its way


def test_an_error_at_the_last_item_is_raised_on_leaving():
    seen, left = [], []
    with pytest.raises(OSError, match="full"), Consumer(fail_at(seen, 3), 10) as consumer:
        for n in range(6):
            consumer.put(n) if n < 4 else None
        left.append(True)
    assert (seen, left) == ([0, 1, 2], [True])


def test_an_error_of_the_consumer_wins_over_one_of_the_block():
    with pytest.raises(OSError, match="full") as caught:
        with Consumer(fail_at([], 0), 10) as consumer:
            consumer.put(0)
            raise KeyboardInterrupt
    assert isinstance(caught.value.__context__, KeyboardInterrupt)


def test_put_waits_where_enough_waits_already():
    free, seen, put = threading.Semaphore(0), [], []

    def handle(n):
        free.acquire()
        seen.append(n)

    def watch():
        until(lambda: len(put) == 3)
        time.sleep(0.02)
        put.append("waited" if len(put) == 3 else "did not wait")
        free.release(10)

    watcher = threading.Thread(target=watch)
    with Consumer(handle, 2) as consumer:
        watcher.start()
        for n in range(10):
            consumer.put(n)
            put.append(n)
    watcher.join()
    assert put[3] == "waited" and seen == list(range(10))


def interrupt(consumer) -> None:
    """Ctrl-C, which the main thread has heard on return."""
    before = consumer._interrupts
    os.kill(os.getpid(), signal.SIGINT)
    until(lambda: consumer._interrupts > before)


@pytest.mark.parametrize("while_leaving", [1, 2])
def test_a_second_interrupt_while_leaving_drops_what_waits(while_leaving):
    seen = []

    def handle(n):
        until(lambda: consumer._left)
        time.sleep(0.2 if not seen else 0)  # for the main thread to begin to wait
        if n < while_leaving:
            interrupt(consumer)
        seen.append(n)

    with pytest.raises(KeyboardInterrupt), Consumer(handle, 100) as consumer:
        for n in range(100):
            consumer.put(n)
    assert seen == (list(range(100)) if while_leaving == 1 else [0, 1])  # what was begun is ended


def test_an_interrupt_of_the_block_is_the_first():
    seen = []

    def handle(n):
        until(lambda: consumer._left)
        time.sleep(0.2)
        interrupt(consumer)
        seen.append(n)

    with pytest.raises(KeyboardInterrupt), Consumer(handle, 100) as consumer:
        for n in range(100):
            consumer.put(n)
        raise KeyboardInterrupt
    assert seen == [0]


PROCESS = """
import itertools, sys, time
from prift.background import Consumer, Prefetch
def items(check):
    for n in itertools.count():
        for _ in range(20):
            check()
        yield n
seen = []
try:
    print("ready", flush=True)
    while True:
        with Prefetch(1) as ahead, Consumer(seen.append, 3) as consumer:
            for n in ahead.start(items(ahead.check)):
                consumer.put(n)
                if n == 20:
                    break
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_at_any_time_ends_the_process():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for n in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS], env=environment, text=True, stdout=subprocess.PIPE
        )
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.003 * n)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=SOON)[0] == "interrupted\n"
        finally:
            process.kill()
