"""Who may run when: advisory locks between runs, and short tries for locks on the table.

The advisory locks are transaction-level ones on a connection of their own, so that they hold behind a pooler in
transaction mode, and polled: a waiter inside a blocking lock call deadlocks with CREATE INDEX CONCURRENTLY. The idle
READ COMMITTED transaction that holds them has no snapshot, so CONCURRENTLY doesn't wait for it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from .. import log
from ..errors import Changed, MigrationError, TryAgain
from ..settings import Settings
from ..sql import blocks, literal
from . import tries
from .database import HELD, WHATEVER, Database, Seen, no_timeouts, second_connection
from .sqlerrors import PASSING, as_migration_error, sqlstate

BLOCKS = blocks("db")

# more than deadlock_timeout, after which the server ends an autovacuum for us; and the most in all, as others may queue
# behind us for so long
LONGER_MS, MOST_FOR_AUTOVACUUM_MS = 500, 2000
POLL = 0.5  # seconds between two looks at an advisory lock
REMIND = 30.0  # seconds between two lines of a waiter
LOOKS = 5  # at a table that others change, before giving up

T = TypeVar("T")
Sleep = Callable[[float], None]


def key_of(*parts: str) -> int:
    """An advisory lock's key: the same for the same names, in whatever process."""
    digest = hashlib.sha256("\0".join(("openmemory_migrations", *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


@contextmanager
def exclusive(engine: Engine, what: str, *parts: str, sleep: Sleep = time.sleep) -> Iterator[None]:
    """Holds the advisory lock of `parts` alone; waits for whoever has it and says for whom."""
    with _held(engine, what, "pg_try_advisory_xact_lock", parts, sleep):
        yield


@contextmanager
def shared(engine: Engine, what: str, *parts: str, sleep: Sleep = time.sleep) -> Iterator[None]:
    """Holds the advisory lock of `parts` beside others that share it."""
    with _held(engine, what, "pg_try_advisory_xact_lock_shared", parts, sleep):
        yield


@contextmanager
def _held(engine: Engine, what: str, function: str, parts: tuple[str, ...], sleep: Sleep) -> Iterator[None]:
    key = key_of(*parts)
    with second_connection(engine) as connection:
        said, db = None, Database(connection, {})
        while True:
            db.set_local(WHATEVER)
            asked = sa.text(f"SELECT {function}(:key), pg_backend_pid()")
            got, pid = connection.execute(asked, {"key": key}).one()
            if got:
                # last, as a statement without a snapshot: psycopg 3 leaves the portal of the one before open, whose
                # snapshot CONCURRENTLY would wait for
                for name, value in no_timeouts(connection).items():
                    connection.execute(sa.text(f"SET LOCAL {name} = {value}"))
                break
            if said is None or time.monotonic() - said >= REMIND:
                said = time.monotonic()
                log.notice(f"waiting for another run on {what}", detail=_holders(connection, key))
            connection.rollback()
            sleep(POLL)
        token = HELD.set((*HELD.get(), (what, key, pid)))
        try:
            yield
        finally:
            HELD.reset(token)
        try:
            connection.rollback()
        except DBAPIError as error:
            raise as_migration_error(error, f"this run's lock on {what}") from error


def _holders(connection: Connection, key: int) -> str:
    rows = connection.execute(
        sa.text(BLOCKS.lock_holders),
        {"key": key},
    )
    found = [f'process {pid} ("{name}", connected since {since:%H:%M:%S %Z})' for pid, name, since in rows]
    return ("Held by " + ", ".join(found) if found else "Its holder has just finished") + "."


def decided(work: Callable[[], T]) -> T:
    """Runs `work`, which looks and then changes by what it saw, again where somebody changed the table in between."""
    for _ in range(LOOKS - 1):
        try:
            return work()
        except Changed as changed:
            log.notice(f"{changed.message}; looking again")
    return work()


def retried(db: Database, timeout_ms: int, table_oid: int, what: str, change: Callable[[], T], seen: Seen = ()) -> T:
    """Runs `change` in a transaction of its own under a short lock_timeout, with growing pauses between its tries.

    Whoever queues behind a waiting ACCESS EXCLUSIVE lock waits no longer than that timeout. Raises MigrationError,
    naming who holds the table, when no try got its locks. A change that was decided by what was `seen` before is made
    under that lock, unless the table isn't what it was: Changed.
    """
    waits_ms, give_way = timeout_ms, False
    for attempt, pause in tries.attempts():
        try:
            with db.transaction():
                # or Citus refuses functions beside a change of its tables
                db.run("SET LOCAL citus.multi_shard_modify_mode TO 'sequential'")
                set_timeout(db, f"{waits_ms}ms")
                if give_way:
                    db.set_local({"deadlock_timeout": f"{max(1, timeout_ms // 4)}ms"})
                if seen:
                    take(db)
                    db.require_seen(seen)
                return change()
        except DBAPIError as error:
            problem = passing(error, what)
        holders = table_holders(db, table_oid)
        give_way, longer = _autovacuum(db, table_oid)
        waits_ms = max(timeout_ms, longer) if attempt == 1 else timeout_ms
        if pause is not None:
            log.notice(f"{problem.message}, try {attempt} of {tries.TRIES}, again in {pause:.1f} s", detail=holders)
            db.stop.sleep(pause)
    raise TryAgain(
        f"{what}: no success in {tries.TRIES} tries of {timeout_ms:,} ms",
        detail=f"{problem.message}. {holders}",
        hint="Run the same command again when that transaction is over; nothing was changed by this step.",
    )


def take(db: Database) -> None:
    """The table alone, with all its partitions, each of which is waited for by itself: as long as lock_timeout in all,
    since whoever wants one that is locked already waits for the others, too."""
    db.run(BLOCKS.all_of_them)
    db.run("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
    db.set_local({"statement_timeout": "0"})


def _autovacuum(db: Database, table_oid: int) -> tuple[bool, int]:
    """Where one holds the table: whether deadlock_timeout may be set for the next try, and else how many milliseconds
    that is to wait, once. The server ends one for whoever waits longer, unless it prevents wraparound.

    With a shorter deadlock_timeout it is still we who give way in a deadlock.
    """
    with db.transaction():
        longer = int(db.value(BLOCKS.autovacuum, {"oid": table_oid}, longer=LONGER_MS))
        superuser = db.value("SELECT current_setting('is_superuser')") == "on"
    return bool(longer and superuser), 0 if superuser or longer > MOST_FOR_AUTOVACUUM_MS else longer


def set_timeout(db: Database, timeout: str) -> None:
    """lock_timeout of the transaction, on Citus on its nodes too.

    Those hear of it by SET LOCAL only, not by set_config(), and only after the first of these two. A server without
    Citus takes that for a name that nobody uses.
    """
    db.run("SET LOCAL citus.propagate_set_commands TO 'local'")
    db.run("SET LOCAL lock_timeout TO {timeout}", timeout=literal(timeout))


def batch_timeout(db: Database, settings: Settings) -> str:
    """lock_timeout of a batch: short enough that in a deadlock it is the batch that gives way, and not the application.

    The server looks for deadlocks after deadlock_timeout, and its victim is whoever has waited that long first.
    """
    return str(db.value(BLOCKS.batch_timeout, lock_timeout=settings.lock_timeout_ms))


def passing(error: DBAPIError, doing: str) -> MigrationError:
    """The error as ours, where another try may mend it; raises it where none can."""
    problem = as_migration_error(error, doing)
    if sqlstate(error) not in PASSING:
        raise problem from error
    return problem


class BatchTries:
    """Of one batch, to read or to write it: each after a longer rest, and with fewer rows, than the one before."""

    def __init__(self, sleep: Sleep) -> None:
        self._sleep = sleep
        self._smallest = False
        self._attempts = tries.attempts()

    def rest(self, problem: MigrationError, number: int, unit: str = "rows") -> None:
        """Rests before the next try, which takes so many rows, or pages; raises TryAgain after the last one."""
        self._smallest = number == 1
        attempt, pause = next(self._attempts)
        if pause is not None:
            log.notice(f"{problem.message}, try {attempt} of {tries.TRIES}, again with {number:,} {unit}")
            self._sleep(pause)
            return
        raise TryAgain(
            f"a batch has failed {tries.TRIES} times; what is committed is kept",
            detail=f"The last time: {problem.message}. {problem.detail or ''}".rstrip(),
            hint="Run the same command again to continue.",
        )

    def heed(self, db: Database) -> None:
        """Ends no statement of a batch that can't be smaller: with a statement_timeout no run would come past it."""
        if self._smallest:
            db.set_local({"statement_timeout": "0"})


def table_holders(db: Database, table_oid: int) -> str:
    with db.transaction():
        return db.in_the_way(table_oid)
