"""How far long work is: a bar on a terminal, a log line at intervals elsewhere.

The bar is tqdm's, which is an extra: without it a terminal gets the lines as well. It is on stderr, where the log's
handlers write too, whoever has made them: while it is there, their lines come above it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from . import log

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL = 5.0  # seconds between two lines
DRAW_INTERVAL = 0.2  # seconds; the clock on the bar goes on while nothing is done
# tqdm's own form, but 0.05 rows/s instead of 20 s/rows
COUNTS = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
SHARES = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"  # where the unit is %


class Shown(Protocol):
    """What `shown` and `bar` tell how far the work is."""

    def to(self, done: int, note: str = "") -> None:
        """So much is done; on a terminal the bar moves, elsewhere a line at intervals. From any thread."""


@contextmanager
def shown(what: str, total: int, unit: str = "rows") -> Iterator[Shown]:
    """Shows how far the work of the block is; a second pass begins again at the bottom."""
    with bar(what, total, unit) as drawn:
        yield drawn or _Lines(what, total, unit)


@contextmanager
def bar(what: str, total: int, unit: str = "rows", done: int = 0) -> Iterator[Shown | None]:
    """The bar alone, for who has lines of its own; None where nobody would see one. It goes at the end of the block.

    `done` was done before, and says nothing of how fast the work is now.
    """
    made = _made(what, total, unit, done)
    if made is None:
        yield None
        return
    over = threading.Event()

    def draw() -> None:
        with suppress(OSError):  # the work doesn't end with its terminal
            while not over.wait(DRAW_INTERVAL):
                made.refresh()

    thread = threading.Thread(target=draw, name="openmemory-migrations bar", daemon=True)
    with _lines_above(type(made)):
        thread.start()
        try:
            yield _Bar(made)
        finally:
            over.set()
            thread.join()
            with suppress(OSError):
                made.close()


def line(what: str, done: int, total: int, unit: str, seconds: float, skipped: int = 0) -> str:
    """`backfill t: 12,000 of 50,000 rows (24 %), 9,800 rows/s, 4 s left`; the skipped aren't done, but over."""
    rate = done / max(seconds, 0.001)
    text = f"{what}: {done:,} of {total:,} {unit} ({percent(done + skipped, total)} %), "
    text += f"{rate:,.0f} {unit}/s" if rate >= 1 or not rate else f"{rate:.2g} {unit}/s"
    left = total - done - skipped
    return text + (f", {log.duration(left / rate)} left" if left > 0 and rate > 0 else "")


def percent(done: int, total: int) -> int:
    return min(100, 100 * done // total) if total else 100


class _Lines:
    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.began = self.said = time.monotonic()
        self.lock = threading.Lock()

    def to(self, done: int, note: str = "") -> None:
        with self.lock:
            now = time.monotonic()
            if _begins_again(done, self.done):
                self.began = now
            self.done = done
            if now - self.said < LOG_INTERVAL:
                return
            self.said = now
            text = line(self.what, done, self.total, self.unit, now - self.began)
        log.notice(f"{text}, {note}" if note else text)


class _Bar:
    """Only takes note of what is done: a thread draws it, so that no batch has to wait for a terminal."""

    def __init__(self, drawn: tqdm[Any]) -> None:
        self.drawn = drawn

    def to(self, done: int, note: str = "") -> None:
        drawn = self.drawn
        if _begins_again(done, int(drawn.n)):
            drawn.initial = done
            # both, or tqdm believes that it has drawn nothing that it would have to take away
            drawn.start_t = drawn.last_print_t = time.time()
        # tqdm forgets a total that is exceeded
        drawn.n = min(done, int(drawn.total)) if drawn.total else done
        drawn.set_postfix_str(note, refresh=False)


def _begins_again(done: int, before: int) -> bool:
    """Whether this is another pass: threads that overtake each other are nearer."""
    return done < before / 2


def _made(what: str, total: int, unit: str, done: int) -> tqdm[Any] | None:
    if not (_is_terminal(sys.stderr) and log.logger.isEnabledFor(logging.INFO)) or os.environ.get("TERM") == "dumb":
        return None
    try:
        from tqdm import tqdm

        made = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=f" {unit}",
            bar_format=SHARES if unit == "%" else COUNTS,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
        )
    except (ImportError, OSError):
        return None
    return None if made.disable else made  # TQDM_DISABLE is set


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # None: closed before Python has started


class _Above:
    """A stream for a log handler, each of whose lines takes the bar away, is written, and puts the bar back."""

    def __init__(self, stream: TextIO, bars: type[tqdm[Any]]) -> None:
        self.stream, self.bars = stream, bars

    def write(self, text: str) -> None:
        self.bars.write(text, file=self.stream, end="")

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def _lines_above(bars: type[tqdm[Any]]) -> Iterator[None]:
    """Gives other streams to the handlers that write to this terminal; format, level and filters stay theirs.

    Not tqdm's logging_redirect_tqdm: it adds a handler to loggers that have none, and forgets the level of others.
    """
    terminal = [stream for stream in (sys.stdout, sys.stderr) if _is_terminal(stream)]
    loggers = [logging.root, *logging.root.manager.loggerDict.copy().values()]
    handlers = {one for logger in loggers if isinstance(logger, logging.Logger) for one in logger.handlers}
    moved = {
        handler: handler.stream
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in terminal
    }
    for handler, stream in moved.items():
        handler.setStream(cast(TextIO, _Above(stream, bars)))
    try:
        yield
    finally:
        for handler, stream in moved.items():
            handler.setStream(stream)
