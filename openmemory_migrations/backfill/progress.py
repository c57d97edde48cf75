"""How far a run is: for its log lines, and in application_name for everybody's look at pg_stat_activity.

A run that is alone counts what it does. One that meets others at the same table looks from time to time at what is
left there, and so shows the whole, whoever does it and wherever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .. import console, log
from ..console import Shown
from ..db.database import Database
from .passes import Obstacles

LOG_INTERVAL = 5.0  # seconds
LOOK_SHARE = 0.05  # at most, of one worker's time, for looking at what is left


@dataclass
class Progress:
    """What has been done since the pass began; `add` may be called from any worker's thread.

    `total` are the rows that were pending then, `pending` counts them anew, and `others` says whether other runs have
    been met.
    """

    what: str
    total: int
    pending: Callable[[Database], int]
    others: Callable[[], object] = bool  # none
    doing: str = "backfill"  # in application_name
    told: tuple[int, int] | None = None  # done and skipped, when last said at the end of a pass
    obstacles: Obstacles = field(default_factory=Obstacles)
    converted: int = 0  # by this run
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)
    bar: Shown | None = None
    _logged: float = field(default_factory=time.monotonic)
    _met: bool = False
    _theirs: int = 0  # rows that others have done, when last looked
    _look_again: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, db: Database, converted: int, skipped: int) -> None:
        """A batch is done; `db` is the connection that has done it, between two transactions."""
        if converted:
            self.obstacles.wrote()
        with self._lock:
            self.converted += converted
            self.skipped += skipped
        self.show(db)

    def show(self, db: Database) -> None:
        """Moves the bar; where there is none, a line if it is time for one."""
        with self._lock:
            due = time.monotonic() - self._logged >= LOG_INTERVAL
            if due:
                self._logged = time.monotonic()
        if due and time.monotonic() >= self._look_again:
            self.look(db)
        if self.bar:
            self.bar.to(self.done + self.skipped, f"{self.skipped:,} skipped" if self.skipped else "")
        elif due:
            log.notice(str(self))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """On a terminal a bar stands for the lines while this lasts."""
        with console.bar(self.what, self.total, done=self.done + self.skipped) as self.bar:
            try:
                yield
            finally:
                self.bar = None

    def look(self, db: Database, *, over: bool = False) -> None:
        """Counts what is left, if there is anybody else who may have done something: who has been met, or who has done
        what this run has not come upon until its pass was over."""
        self._met = self._met or bool(self.others()) or (over and self.done + self.skipped < self.total)
        if not self._met:
            return
        began = time.monotonic()
        with db.transaction(snapshot=True):
            left = self.pending(db)
        self._theirs = max(0, self.total - left - self.converted)
        looked = time.monotonic()
        self._look_again = looked + (looked - began) / LOOK_SHARE

    def tell(self) -> None:
        """Logs how far the pass is, unless that has been said."""
        now = (self.done, self.skipped)
        if now != self.told:
            self.told = now
            log.notice(str(self))

    @property
    def done(self) -> int:
        return min(self.total, self.converted + self._theirs)

    @property
    def percent(self) -> int:
        return console.percent(self.done + self.skipped, self.total)

    @property
    def activity(self) -> str:
        return f"{self.doing} {self.percent} %"

    def __str__(self) -> str:
        done = self.done
        # a worker may come to a row a second time that can't be converted
        skipped = min(self.skipped, self.total - done)
        text = console.line(self.what, done, self.total, "rows", time.monotonic() - self.started, skipped)
        text += f", {skipped:,} skipped" if skipped else ""
        return text + (f"; {self.converted:,} of them by this run" if self._theirs else "")
