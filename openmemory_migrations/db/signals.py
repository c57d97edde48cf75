"""SIGINT and SIGTERM while we work: the statement that runs is cancelled, the batch rolled back, the run ends in order.

The same way ends work that was given so many seconds.

A driver's call blocks until the server answers, and Python runs its signal handlers only after that: an index build
would not hear Ctrl-C for hours. The signal's number arrives in a socket at once, though, and a thread reads it there.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import MigrationError, TryAgain

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CANCEL_AGAIN = 1.0  # seconds: a cancel that arrives between two statements has no effect


class Interrupted(TryAgain):
    """The run was told to stop; what is committed is kept."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(
            f"stopped by {signal_name}; what is committed is kept",
            hint="Run the same command again to continue.",
        )


class TimeUp(MigrationError):
    """The seconds that the work was given are over."""


class Stop:
    """Whether a signal has asked the run to stop, or its time is up."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._heeded = threading.Event()
        self._signal = 0
        self._late = False

    def ask(self, number: int) -> None:
        self._signal = number
        self._asked.set()

    @property
    def asked(self) -> bool:
        return self._asked.is_set() and not self._heeded.is_set()

    def check(self) -> None:
        """Raises Interrupted once a signal has come, and only once: what cleans up after it runs undisturbed."""
        if self.asked:
            self._heeded.set()
            raise Interrupted(signal.Signals(self._signal).name)
        if self._late:
            self._late = False
            raise TimeUp("the time is up")

    def sleep(self, seconds: float) -> None:
        """Sleeps, but not through a signal."""
        if not self._heeded.is_set():
            self._asked.wait(seconds)
            self.check()

    @contextmanager
    def within(self, seconds: float | None, cancel: Callable[[], None]) -> Iterator[None]:
        """Has `check`, or the statement that runs then, raise TimeUp after so many seconds; None: never."""
        over = threading.Event()

        def watch() -> None:
            if not over.wait(seconds):
                self._late = True
                while self._late and not over.is_set():
                    cancel()
                    over.wait(CANCEL_AGAIN)

        thread = threading.Thread(target=watch, name="openmemory-migrations clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._late = False

    def finish(self) -> None:
        """The work is over: nothing is left to cancel."""
        self._heeded.set()

    def cancel_until_heeded(self, cancel: Callable[[], None]) -> None:
        while not self._heeded.is_set():
            cancel()
            self._heeded.wait(CANCEL_AGAIN)


@contextmanager
def listening(stop: Stop, cancel: Callable[[], None]) -> Iterator[None]:
    """Has signals ask `stop` and call `cancel` while it lasts; outside Python's main thread that can't be had."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] not in SIGNALS:
                continue
            stop.ask(number[0])
            stop.cancel_until_heeded(cancel)

    def handler(number: int, frame: FrameType | None) -> None:
        # the thread does the work; this only keeps Python from its own way of handling the signal
        stop.ask(number)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="openmemory-migrations signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, previous in before.items():
            signal.signal(number, previous)
        stop.finish()
        writer.close()
        thread.join()
        reader.close()
