"""Second step: streams `v` into `v_vector`, batch by batch, each read, converted, written and committed by itself.

A pass reads the table in physical order, by ranges of tids, up to the page that was its last when the pass began: no
OFFSET, no index, no sort, and a batch costs the same in a small table and in a large one. A row that another
transaction moves behind the scan is found by the next pass; the last word has one statement with one snapshot.

A batch is read and written in one transaction, which therefore holds ACCESS SHARE on the table all the time: nobody can
rewrite it in between (CLUSTER keeps xmin and moves rows), so tid and xmin together name one version of one row. The
UPDATE asks for both, and so never writes a value to a row that has changed since it was read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sqlalchemy.exc import DBAPIError

from . import catalog, codec, dimensions, locks, log
from .catalog import Extension, Table
from .codec import Batch
from .database import APPLICATION_NAME, Database, as_migration_error, sqlstate
from .errors import MigrationError
from .pace import Pace
from .settings import Settings
from .target import Target, literal, quote

BATCH_BYTES = 8 * 1024**2
PAGES_A_READ = 32_768  # 256 MiB of heap: how far one statement looks when there is little to find
PAGES_A_CARRY = 64  # at most some 14,000 rows, as short a lock on them as a batch's
LOOK_ROWS = 1000  # at once, where nothing is written
LOG_INTERVAL = 5.0  # seconds
SHOWN_KEYS = 5

# the planner would rather hash or scan the whole table once per batch as long as it thinks that it is small
PLAN = """
SELECT set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
       set_config('enable_mergejoin', 'off', true), set_config('enable_indexscan', 'off', true),
       set_config('enable_indexonlyscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('max_parallel_workers_per_gather', '0', true),
       set_config('application_name', :progress, true), set_config('lock_timeout', :lock_timeout, true)
"""
READ = """
SELECT ctid, xmin, {source} FROM ONLY {table}
WHERE ctid > '({page},{item})' AND ctid < '({end},0)' AND {vector} IS NULL AND octet_length({source}) = {octets}
LIMIT {rows}
"""
# main: a value of more than 2 kB would be compressed and moved out of line, only to be read back at once
CREATE_STAGE = "CREATE TEMPORARY TABLE {stage} (tid tid, version xid, vector {ext}.vector) ON COMMIT DROP"
STAGE_INLINE = "ALTER TABLE pg_temp.{stage} ALTER COLUMN vector SET STORAGE MAIN"
WRITE = """
UPDATE ONLY {table} AS t SET {vector} = s.vector
FROM pg_temp.{stage} AS s WHERE t.ctid = s.tid AND t.xmin = s.version
"""
ADOPTED_ONLY = "{source} IS NULL AND {vector} IS NULL AND {adopted} IS NOT NULL"
CARRY_OVER = (
    "UPDATE ONLY {table} SET {vector} = {adopted} WHERE ctid >= '({page},0)' AND ctid < '({end},0)' AND " + ADOPTED_ONLY
)
NOT_FINITE = "NaN or infinite values"
STAGE = "openmemory_migrations_stage"


@dataclass
class Progress:
    """What one run has done so far, for its log lines and for everybody else's look at pg_stat_activity."""

    what: str
    total: int
    converted: int = 0
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)

    def add(self, converted: int, skipped: int) -> None:
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


@dataclass(frozen=True)
class Leftovers:
    """Rows with bytes and no vector, seen in one snapshot: `reasons` counts those that can't be converted."""

    convertible: int
    reasons: Counter[str]
    examples: dict[str, list[str]]  # reason -> the first few keys
    dim_differs: int  # rows whose column `dim` says something else than the bytes

    @property
    def skipped(self) -> int:
        return sum(self.reasons.values())

    def summary(self) -> str:
        return "; ".join(
            f"{reason}: {rows:,} (such as {', '.join(self.examples[reason])})"
            if self.examples.get(reason)
            # a row can change its place while we look
            else f"{reason}: {rows:,}"
            for reason, rows in self.reasons.most_common()
        )


class Scan:
    """A walk over the pending rows of one length, in physical order, as far as the table reaches at its start."""

    def __init__(self, dimensions: int, most_rows: int, last_page: int) -> None:
        self.dimensions = dimensions
        self.most_rows = self.rows = max(1, min(most_rows, BATCH_BYTES // (4 * dimensions)))
        self.last_page = last_page
        self.position = (0, 0)  # the last tid that is done with: page, item

    @property
    def more(self) -> bool:
        return self.position[0] < self.last_page

    @property
    def _end(self) -> int:
        return min(self.position[0] + PAGES_A_READ, self.last_page)

    def read(self, db: Database) -> Batch:
        page, item = self.position
        copied = db.copy_out(
            READ,
            page=str(page),
            item=str(item),
            end=str(self._end),
            octets=str(4 * self.dimensions),
            rows=str(self.rows),
        )
        return codec.convert(copied, self.dimensions)

    def advance(self, batch: Batch) -> None:
        # fewer rows than asked for: nothing is left before the end of what was looked at
        full = batch.rows_read == self.rows and batch.last_tid is not None
        self.position = batch.last_tid if full and batch.last_tid else (self._end, 0)
        self.rows = min(2 * self.rows, self.most_rows)

    def shrink(self) -> None:
        """A batch has failed for a reason that may pass: half as many rows meet half as many locks."""
        self.rows = max(1, self.rows // 2)


def run(db: Database, target: Target, settings: Settings, table: Table, extension: Extension) -> Leftovers:
    """Converts all that can be converted, logs progress, and returns what is left with its reasons.

    Without the trigger a busy application leaves new rows behind for ever, so then two passes are all.
    """
    fixed = table.columns[target.vector].dimensions
    with db.transaction():
        followed = catalog.trigger_enabled(db, table.oid, target.sync)
        pace = Pace(db, settings)
        lock_timeout = locks.batch_timeout(db, settings)
    for attempt in range(1, 1000):
        for size in [fixed] if fixed else _sizes(db):
            with db.transaction(snapshot=True):
                progress = Progress(f"backfill {target.table}", _pending(db, size))
                scan = Scan(size, settings.backfill_batch, _pages(db))
            for converted, skipped in convert(db, scan, extension, progress, lock_timeout):
                progress.add(converted, skipped)
                pace.rest(progress.what)
            if progress.total or attempt == 1:
                log.notice(str(progress))
        left = leftovers(db, target, table)
        if not left.convertible or (attempt >= 2 and not followed):
            return left
    raise MigrationError(
        f"{left.convertible:,} rows of {target} are still not converted after {attempt:,} passes",
        hint="Something writes v past the sync trigger; run the same command again when it has stopped.",
    )


def convert(
    db: Database, scan: Scan, extension: Extension, progress: Progress, lock_timeout: str
) -> Iterator[tuple[int, int]]:
    """Yields the rows converted and skipped of each batch, after its commit."""

    def batch() -> tuple[Batch, int]:
        with db.transaction():
            _plan(db, progress.application_name, lock_timeout)
            found = scan.read(db)
            return found, write(db, found, extension) if found.rows_good else 0

    while scan.more:
        found, written = _retried(db, scan, progress.what, batch)
        scan.advance(found)
        yield written, found.rows_read - found.rows_good


def _retried(db: Database, scan: Scan, what: str, batch: Callable[[], tuple[Batch, int]]) -> tuple[Batch, int]:
    """Tries a batch again, smaller, when a lock, a deadlock or a timeout of the role's was in its way."""
    for attempt, pause in enumerate(locks.pauses(), 1):
        try:
            return batch()
        except DBAPIError as error:
            problem, state = as_migration_error(error, what), sqlstate(error)
            if state not in locks.PASSING:
                raise problem from error
        scan.shrink()
        log.notice(f"{problem.message}, try {attempt} of {locks.TRIES}, again with {scan.rows:,} rows")
        db.stop.sleep(pause)
    raise MigrationError(
        f"{what}: a batch has failed {locks.TRIES} times; what is committed is kept",
        detail=f"The last time: {problem.message}.",
        hint="Run the same command again to continue.",
    )


def _plan(db: Database, application_name: str, lock_timeout: str) -> None:
    db.run(PLAN, {"progress": application_name, "lock_timeout": lock_timeout})


def write(db: Database, batch: Batch, extension: Extension) -> int:
    """Gives the rows of the batch their vectors, but for those that have changed since; returns how many it gave."""
    db.run(CREATE_STAGE, stage=quote(STAGE), **extension.names())
    db.run(STAGE_INLINE, stage=quote(STAGE))
    db.copy_in(STAGE, batch.payload)
    return db.run(WRITE, stage=quote(STAGE)).rowcount


def carry_over(db: Database, target: Target, settings: Settings, table: Table) -> None:
    """Moves the values without source from the adopted column to ours, then drops the adopted column."""
    moved = 0
    while True:
        with db.transaction(snapshot=True):
            if not db.value("SELECT EXISTS (SELECT FROM ONLY {table} WHERE " + ADOPTED_ONLY + ")"):
                break
            last_page, lock_timeout = _pages(db), locks.batch_timeout(db, settings)
        for page in range(0, last_page, PAGES_A_CARRY):
            with db.transaction():
                _plan(db, f"{APPLICATION_NAME} carrying values over", lock_timeout)
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


def leftovers(db: Database, target: Target, table: Table) -> Leftovers:
    """Looks at every row without a vector, in one snapshot: what moves meanwhile is neither missed nor seen twice."""
    fixed = table.columns[target.vector].dimensions
    reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    convertible = 0
    with db.transaction(snapshot=True):
        last_page = _pages(db)
        lengths: dict[str, list[int]] = {}
        pending = db.rows(
            "SELECT octet_length({source}), count(*) FROM ONLY {table}"
            " WHERE {vector} IS NULL AND {source} IS NOT NULL GROUP BY 1 ORDER BY 1"
        )
        for octets, rows in pending:
            reason = dimensions.problem(octets, fixed)
            if reason:
                reasons[reason] += rows
                lengths.setdefault(reason, []).append(octets)
        for reason, found in lengths.items():
            examples[reason] = _keys(db, table, "octet_length({source}) = ANY (:values)", found)
        _plan(db, f"{APPLICATION_NAME} looking at what is left", "0")
        for octets, _ in pending:
            if dimensions.problem(octets, fixed):
                continue
            scan = Scan(octets // 4, LOOK_ROWS, last_page)
            bad: list[str] = []
            while scan.more:
                batch = scan.read(db)
                scan.advance(batch)
                convertible += batch.rows_good
                reasons.update({NOT_FINITE: batch.rows_read - batch.rows_good})
                bad += batch.bad_tids[: SHOWN_KEYS - len(bad)]
            if bad:
                examples.setdefault(NOT_FINITE, []).extend(_keys(db, table, "ctid = ANY (CAST(:values AS tid[]))", bad))
        differs = 0
        if target.source == "v" and (dim := table.columns.get("dim")) and dim.type in ("smallint", "integer", "bigint"):
            differs = db.value(
                "SELECT count(*) FROM ONLY {table} WHERE octet_length({source}) <> 4 * CAST(dim AS bigint)"
            )
    return Leftovers(convertible, +reasons, examples, differs)


def _keys(db: Database, table: Table, condition: str, values: list[int] | list[str]) -> list[str]:
    """The first few pending rows that meet `condition`, by their primary key, else by their place."""
    columns = [f"concat({literal(name + '=')}, {quote(name)})" for name in table.key]
    shown = f"concat_ws(', ', {', '.join(columns)})" if columns else "concat('ctid=', ctid)"
    rows = db.rows(
        "SELECT {shown} FROM ONLY {table} WHERE {vector} IS NULL AND " + condition + " LIMIT {most}",
        {"values": values},
        shown=shown,
        most=str(SHOWN_KEYS),
    )
    return [f"({row[0]})" for row in rows]


def _pages(db: Database) -> int:
    return int(
        db.value(
            """
            SELECT pg_catalog.pg_relation_size(CAST(:table AS regclass))
                   / CAST(current_setting('block_size') AS integer)
            """,
            {"table": db.names["table"]},
        )
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
