"""How far a run is: for its log lines, and in application_name for everybody's look at pg_stat_activity."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from . import log
from .database import APPLICATION_NAME

LOG_INTERVAL = 5.0  # seconds


@dataclass
class Progress:
    """What a run's workers have done so far; `add` may be called from any of their threads."""

    what: str
    total: int
    converted: int = 0
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, converted: int, skipped: int) -> None:
        with self._lock:
            self.converted += converted
            self.skipped += skipped
            if time.monotonic() - self.logged >= LOG_INTERVAL:
                self.logged = time.monotonic()
                log.notice(str(self))

    @property
    def percent(self) -> int:
        done = self.converted + self.skipped
        return min(100, 100 * done // self.total) if self.total else 100

    @property
    def application_name(self) -> str:
        return f"{APPLICATION_NAME} backfill {self.percent} %"

    def __str__(self) -> str:
        rate = self.converted / max(time.monotonic() - self.started, 0.001)
        text = f"{self.what}: {self.converted:,} of {self.total:,} rows ({self.percent} %), {rate:,.0f} rows/s"
        left = self.total - self.converted - self.skipped
        if left > 0 and rate > 0:
            text += f", {log.duration(left / rate)} left"
        return text + (f", {self.skipped:,} skipped" if self.skipped else "")
