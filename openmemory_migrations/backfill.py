"""Second step: fills `v_vector` from `v` in batches, each committed by itself.

An engine goes over the table, pass after pass, until one statement with one snapshot finds nothing that could be
converted: what another transaction moves past it is found by the next pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from . import catalog, citus, claims, dimensions, locks, log, partitions
from .catalog import Extension, Table
from .claims import Claim, Claims
from .database import APPLICATION_NAME, Database
from .engine_client import ClientEngine
from .engine_server import ServerEngine
from .errors import MigrationError
from .leftovers import Leftovers, by_converting, by_reading, leftovers
from .pace import Pace
from .progress import Progress
from .reading import PLAN, pages_of
from .settings import Settings
from .target import Target, quote

PAGES_A_CARRY = 64  # at most some 14,000 rows, as short a lock on them as a batch's
PATIENCE = 60  # seconds in which what another run has claimed is left to it
POLL = 0.1  # seconds between two looks at whether it has given that back

ADOPTED_ONLY = "{source} IS NULL AND {vector} IS NULL AND {adopted} IS NOT NULL"
CARRY_OVER = (
    "UPDATE ONLY {table} SET {vector} = {adopted} WHERE ctid >= '({page},0)' AND ctid < '({end},0)' AND " + ADOPTED_ONLY
)


class Engine(Protocol):
    def walk(self, dimensions: int, workers: list[Claims], progress: Progress, pace: Pace) -> None:
        """Goes once over all pending rows of that many dimensions, with so many workers."""


def run(db: Database, target: Target, settings: Settings, table: Table, extension: Extension) -> Leftovers:
    """Converts all that can be converted, logs progress, and returns what is left with its reasons.

    Without the trigger a busy application leaves new rows behind for ever, so then two passes are all.
    """
    fixed = table.columns[target.vector].dimensions
    what = f"backfill {target.table}"
    with db.transaction():
        followed = catalog.trigger_enabled(db, table.oid, target.sync)
        pace = Pace(db, settings)
        in_server = citus.engine(db, target, settings, table) == "server"
    make: Callable[..., Engine] = ServerEngine if in_server else ClientEngine
    engine = make(db, target, settings, table, extension)
    heeded = True
    passes = 0
    started: dict[int, Progress] = {}  # of the pass that is going on, with its waits for other runs
    while passes < 1000:
        waiting: set[Claim] = set()
        for size in [fixed] if fixed else _sizes(db):
            pending = partial(_pending, size=size)
            workers = [Claims(heeded) for _ in range(settings.backfill_workers)]
            with db.transaction(snapshot=True):
                rows = pending(db)
            progress = started.setdefault(size, Progress(what, rows, pending, told=(0, 0) if passes else None))
            progress.others = partial(claims.of_others, workers)
            if rows:
                with progress.shown():
                    engine.walk(size, workers, progress, pace)
            progress.look(db)
            progress.tell()
            waiting |= claims.of_others(workers)
        if waiting:
            log.notice(f"{what}: another run is at work on a part of the table; waiting for it")
            with progress.shown():
                heeded = _given_back(db, waiting, progress)
            continue
        passes += 1
        started.clear()
        left = leftovers(db, target, table, by_converting if in_server else by_reading)
        if not left.convertible or (passes >= 2 and not followed):
            return left
    raise MigrationError(
        f"{left.convertible:,} rows of {target} are still not converted after {passes:,} passes",
        hint="Something writes v past the sync trigger; run the same command again when it has stopped.",
    )


def _given_back(db: Database, parts: set[Claim], progress: Progress) -> bool:
    """Waits until no other run has a claim on these parts, and says whether that has come to pass."""
    over = time.monotonic() + PATIENCE
    while time.monotonic() < over:
        with db.transaction():
            if not parts & claims.held(db):
                return True
        if progress.bar:
            progress.show(db)
        db.stop.sleep(POLL)
    return False


def carry_over(db: Database, target: Target, settings: Settings, table: Table) -> None:
    """Moves the values without source from the adopted column to ours, then drops the adopted column."""
    locks.decided(lambda: _carry_over(db, target, settings, table))


def _carry_over(db: Database, target: Target, settings: Settings, table: Table) -> None:
    moved = 0
    with db.transaction():
        spread = citus.shards(db, table.oid)

    def at_once() -> int:
        return int(db.run("UPDATE {table} SET {vector} = {adopted} WHERE " + ADOPTED_ONLY).rowcount)

    while True:
        with db.transaction(snapshot=True) as seen:
            if not db.value("SELECT EXISTS (SELECT FROM {table} WHERE " + ADOPTED_ONLY + ")"):
                break
            lock_timeout = locks.batch_timeout(db, settings)
            walks = [(part.at(db), pages_of(part.at(db))) for part in partitions.leaves(db, table.oid)]
        if spread:  # no place to go by; rows without source are few
            moved += locks.retried(db, settings.lock_timeout_ms, table.oid, "carrying values over", at_once)
            continue
        for at, last_page in walks:
            for page in range(0, last_page, PAGES_A_CARRY):
                with db.transaction():
                    db.run(PLAN, {"name": f"{APPLICATION_NAME} carrying values over", "lock_timeout": lock_timeout})
                    end = min(page + PAGES_A_CARRY, last_page)
                    moved += at.run(CARRY_OVER, page=str(page), end=str(end)).rowcount
    if moved:
        log.notice(
            f"{moved:,} values without source in {quote(target.source)} carried over from {quote(target.adopted)}"
        )
    locks.retried(
        db,
        settings.lock_timeout_ms,
        table.oid,
        f"dropping {quote(target.adopted)} of {target}",
        lambda: db.run("ALTER TABLE {table} DROP COLUMN IF EXISTS {adopted}"),
        seen,
    )


def _pending(db: Database, size: int) -> int:
    return int(
        db.value(
            "SELECT count(*) FROM {table} WHERE {vector} IS NULL AND octet_length({source}) = :octets",
            {"octets": 4 * size},
        )
    )


def _sizes(db: Database) -> list[int]:
    """The dimensions that pending rows have, for a column without dimensions."""
    with db.transaction(snapshot=True):
        rows = db.rows(
            "SELECT DISTINCT octet_length({source}) FROM {table} WHERE {vector} IS NULL AND {source} IS NOT NULL"
        )
    return sorted(octets // 4 for (octets,) in rows if dimensions.problem(octets, None) is None)
