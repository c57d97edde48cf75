"""How fast the backfill may go: a rest after each batch, a halt while a replica lags, and an end before a replication
slot keeps more WAL than the disk may hold.

The lag is measured here, not read: pg_stat_replication.replay_lag stays as it is while a replica has stopped replaying.
A place in the WAL is noted with its time at each look; the lag is the age of the oldest one not replayed everywhere.
"""

from __future__ import annotations

import copy
import time
from collections import deque

from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import catalog
from ..db.database import Database
from ..errors import MigrationError, TryAgain
from ..log import amount
from ..settings import Settings
from ..sql import blocks, literal, quote

BLOCKS = blocks("backfill")

LOOK = 0.5  # seconds between two looks at the replicas
ONE_BATCH = 128 * 1024**2  # bytes of WAL: 32 MiB of values, and pages that are written whole after a checkpoint
REMIND = 30.0  # seconds between two lines while the backfill is held


def require_sight(db: Database) -> None:
    if not catalog.sees_others(db):
        raise MigrationError(
            "OM_BACKFILL_MAX_LAG is set, but this role may not see the lag of replicas",
            hint=f"GRANT pg_monitor TO {quote(db.value('SELECT current_user'))};",
        )


class Slots:
    """The WAL that replication slots keep from being removed, in bytes, and the limit on it."""

    def __init__(self, limit_kb: int) -> None:
        self.limit = 1024 * limit_kb
        self.position = -1  # in the WAL, at the last look
        self.batch = min(ONE_BATCH, self.limit // 4)  # what another may write, until one has written more

    def exceeded(self, db: Database) -> MigrationError | None:
        """Why nothing more may be written, if another batch could come to the limit."""
        ((name, kept, position),) = db.rows(BLOCKS.kept) or [(None, 0, 0)]
        if name is None:
            return None
        if self.position >= 0:
            self.batch = max(self.batch, position - self.position)
        self.position = position
        if kept + self.batch < self.limit:
            return None
        return TryAgain(
            f"replication slot {quote(name)} keeps {amount(kept)} of WAL, and OM_STOP_AT_SLOT_LAG is"
            f" {amount(self.limit)}",
            detail=f"Another batch may write {amount(self.batch)}.",
            hint="Run the same command again when its consumer has caught up; if nobody will come back for it:"
            f" SELECT pg_drop_replication_slot({literal(name)});",
        )


def slots_in_the_way(db: Database, settings: Settings) -> MigrationError | None:
    """Why a backfill would write nothing at all."""
    return Slots(settings.stop_at_slot_lag).exceeded(db) if settings.stop_at_slot_lag else None


class Pace:
    """Raises MigrationError at once where a limit on the lag is set and this role may not see the lag."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db, self.pause, self.max_lag = db, settings.backfill_pause_ms / 1000, settings.backfill_max_lag
        self.looked = time.monotonic()
        self.written: deque[tuple[float, int]] = deque()  # when, WAL position in bytes
        self.replicas = 0
        self.slots = Slots(settings.stop_at_slot_lag) if settings.stop_at_slot_lag else None
        if self.max_lag is None:
            return
        require_sight(db)
        self.replicas, _ = self._look()
        if not self.replicas:
            log.warning("OM_BACKFILL_MAX_LAG is set, but no replica is connected: nothing to wait for")

    def on(self, db: Database) -> Pace:
        """The same for a worker on another connection."""
        other = copy.copy(self)
        other.db, other.written, other.slots = db, self.written.copy(), copy.copy(self.slots)
        return other

    def heed_slots(self) -> None:
        """Raises TryAgain where nothing more may be written; called before each batch, with no transaction open."""
        if self.slots is None:
            return
        with self.db.transaction():
            problem = self.slots.exceeded(self.db)
        if problem:
            raise problem

    def rest(self, what: str) -> None:
        """Rests as long as the settings ask for; called between two batches, with no transaction open."""
        self.db.stop.check()
        self.heed_slots()
        if self.pause:
            self.db.stop.sleep(self.pause)
        if self.max_lag is None or time.monotonic() - self.looked < LOOK:
            return
        said: float | None = None
        while reason := self._held():
            if said is None or time.monotonic() - said >= REMIND:
                said = time.monotonic()
                log.notice(f"{what}: held, {reason}", detail=f"OM_BACKFILL_MAX_LAG is {self.max_lag} s.")
            self.db.stop.sleep(LOOK)
        if said is not None:
            log.notice(f"{what}: goes on, no replica lags by more than {self.max_lag} s")

    def _held(self) -> str | None:
        """Why the backfill has to wait; a look that fails is a reason as well."""
        assert self.max_lag is not None
        try:
            with self.db.transaction():
                replicas, lag = self._look()
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            return f"the lag of the replicas can't be seen ({type(error.orig).__name__})"
        if replicas < self.replicas:
            return f"{self.replicas - replicas} of {self.replicas} replicas are not connected"
        self.replicas = replicas
        return f"a replica lags by {lag:.1f} s" if lag > self.max_lag else None

    def _look(self) -> tuple[int, float]:
        """How many replicas stream, and the lag of the slowest in seconds."""
        self.looked = time.monotonic()
        replicas, current, replayed = self.db.rows(BLOCKS.look)[0]
        self.written.append((self.looked, current))
        while self.written and (replayed is None or self.written[0][1] <= replayed):
            self.written.popleft()
        return replicas, self.looked - self.written[0][0] if self.written else 0.0
