"""Second step: streams `v` into `v_vector`, batch by batch, each written and committed by itself.

A pass reads the table in physical order, by ranges of tids, up to the page that was its last when the pass began: no
OFFSET, no index, no sort, and a batch costs the same in a small table and in a large one. A row that another
transaction moves behind the scan is found by the next pass; the last word has one statement with one snapshot.

A batch is read and converted on a connection of its own while the one before it is written. Its UPDATE asks for tid,
xmin and the table's file as they were when the row was read, and so never writes a value to a row that has changed.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

from sqlalchemy.exc import DBAPIError

from . import catalog, dimensions, locks, log
from .beside import Beside, ahead
from .catalog import Extension, Table
from .database import APPLICATION_NAME, Database, as_migration_error, sqlstate
from .errors import MigrationError
from .leftovers import Leftovers, leftovers, pages_of
from .pace import Pace
from .progress import Progress
from .reading import PLAN, Found, Reader, claimed, space_of
from .settings import Settings
from .target import Target, quote
from .writing import Stage

PAGES_A_CARRY = 64  # at most some 14,000 rows, as short a lock on them as a batch's
PATIENCE = 60  # seconds in which what another run has claimed is left to it

ADOPTED_ONLY = "{source} IS NULL AND {vector} IS NULL AND {adopted} IS NOT NULL"
CARRY_OVER = (
    "UPDATE ONLY {table} SET {vector} = {adopted} WHERE ctid >= '({page},0)' AND ctid < '({end},0)' AND " + ADOPTED_ONLY
)


def run(db: Database, target: Target, settings: Settings, table: Table, extension: Extension) -> Leftovers:
    """Converts all that can be converted, logs progress, and returns what is left with its reasons.

    Without the trigger a busy application leaves new rows behind for ever, so then two passes are all.
    """
    fixed = table.columns[target.vector].dimensions
    what = f"backfill {target.table}"
    with db.transaction():
        followed = catalog.trigger_enabled(db, table.oid, target.sync)
        vector_oid = catalog.vector_oid(db)
        lock_timeout = locks.batch_timeout(db, settings)
        pace = Pace(db, settings)
    space = space_of(target.schema, target.table, target.vector)
    heed_claims = True
    passes = 0
    while passes < 1000:
        others: set[int] = set()
        for size in [fixed] if fixed else _sizes(db):
            with db.transaction(snapshot=True):
                progress = Progress(what, _pending(db, size))
                reader = Reader(
                    what=what,
                    space=space,
                    pages=pages_of(db),
                    dimensions=size,
                    most_rows=settings.backfill_batch,
                    vector_oid=vector_oid,
                    lock_timeout=lock_timeout,
                    heed_claims=heed_claims,
                )
            others |= _pass(db, reader, extension, pace, progress, settings.backfill_workers)
            # not each time that another run is waited for
            if progress.converted or progress.skipped or not passes:
                log.notice(str(progress))
        if others:
            log.notice(f"{what}: another run is at work on a part of the table; waiting for it")
            heed_claims = _given_back(db, space, others)
            continue
        passes += 1
        left = leftovers(db, target, table)
        if not left.convertible or (passes >= 2 and not followed):
            return left
    raise MigrationError(
        f"{left.convertible:,} rows of {target} are still not converted after {passes:,} passes",
        hint="Something writes v past the sync trigger; run the same command again when it has stopped.",
    )


def _given_back(db: Database, space: int, units: set[int]) -> bool:
    """Waits until no other run has a claim on these units, and says whether that has come to pass."""
    for _ in range(PATIENCE):
        with db.transaction():
            if not units & claimed(db, space):
                return True
        db.stop.sleep(1)
    return False


def _pass(db: Database, reader: Reader, extension: Extension, pace: Pace, progress: Progress, workers: int) -> set[int]:
    """One walk over the table by all workers; returns the units that other runs had claimed."""
    readers = [reader, *(replace(reader, claimed=set(), refused=set()) for _ in range(workers - 1))]

    def convert(db: Database, reader: Reader) -> None:
        _Writer(db, reader.lock_timeout, extension, progress).take(reader, pace.on(db))

    with ExitStack() as running:
        others = [running.enter_context(Beside(db, partial(convert, reader=reader))) for reader in readers[1:]]
        convert(db, readers[0])
        for other in others:
            other.join()
            if refused := other.refused:
                log.notice(refused.message, detail="The other workers have done its share.")
    ours: set[int] = set().union(*(reader.claimed for reader in readers))
    return set().union(*(reader.refused for reader in readers)) - ours


class _Writer:
    """Writes batch after batch, each in a transaction of its own, in smaller parts while something is in the way."""

    def __init__(self, db: Database, lock_timeout: str, extension: Extension, progress: Progress) -> None:
        self.db, self.lock_timeout, self.progress = db, lock_timeout, progress
        self.most_rows = sys.maxsize
        with db.transaction():
            self.stage = Stage(db, extension.names())

    def take(self, reader: Reader, pace: Pace) -> None:
        try:
            with ahead(self.db, reader.batches) as batches:
                for found in batches:
                    self._write(found)
                    self.progress.add(len(found.rows), found.rows_bad)
                    pace.rest(self.progress.what)
        finally:
            with suppress(DBAPIError):  # a session that ends drops it as well
                self.stage.drop()

    def _write(self, found: Found) -> None:
        first, tries = 0, locks.Tries(self.db.stop.sleep)
        while first < len(found.rows):
            end = min(first + self.most_rows, len(found.rows))
            try:
                with self.db.transaction():
                    name = self.progress.application_name
                    self.db.run(PLAN, {"name": name, "lock_timeout": self.lock_timeout})
                    self.stage.write(found.part(first, end))
                self.stage.committed()
            except DBAPIError as error:
                problem = as_migration_error(error, self.progress.what)
                if sqlstate(error) not in locks.PASSING:
                    raise problem from error
                self.most_rows = max(1, (end - first) // 2)
                tries.rest(problem, self.most_rows)
            else:
                first, tries, self.most_rows = end, locks.Tries(self.db.stop.sleep), 2 * self.most_rows


def carry_over(db: Database, target: Target, settings: Settings, table: Table) -> None:
    """Moves the values without source from the adopted column to ours, then drops the adopted column."""
    moved = 0
    while True:
        with db.transaction(snapshot=True):
            if not db.value("SELECT EXISTS (SELECT FROM ONLY {table} WHERE " + ADOPTED_ONLY + ")"):
                break
            last_page, lock_timeout = pages_of(db), locks.batch_timeout(db, settings)
        for page in range(0, last_page, PAGES_A_CARRY):
            with db.transaction():
                db.run(PLAN, {"name": f"{APPLICATION_NAME} carrying values over", "lock_timeout": lock_timeout})
                moved += db.run(CARRY_OVER, page=str(page), end=str(min(page + PAGES_A_CARRY, last_page))).rowcount
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
    )


def _pending(db: Database, size: int) -> int:
    return int(
        db.value(
            "SELECT count(*) FROM ONLY {table} WHERE {vector} IS NULL AND octet_length({source}) = :octets",
            {"octets": 4 * size},
        )
    )


def _sizes(db: Database) -> list[int]:
    """The dimensions that pending rows have, for a column without dimensions."""
    with db.transaction(snapshot=True):
        rows = db.rows(
            "SELECT DISTINCT octet_length({source}) FROM ONLY {table} WHERE {vector} IS NULL AND {source} IS NOT NULL"
        )
    return sorted(octets // 4 for (octets,) in rows if dimensions.problem(octets, None) is None)
