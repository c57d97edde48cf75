"""Reads the rows that have bytes and no vector, or the other way round, in physical order, unit by unit of their pages.

A unit is claimed before it is read, so that workers in this process and in others share a table without doing anything
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import locks
from ..db.catalog import Table
from ..db.database import APPLICATION_NAME, LOCK_TIMEOUT, WHATEVER, Database
from ..db.keys import keys_at
from ..db.partitions import Part
from ..encoding import codec
from ..encoding.codec import Rows
from ..encoding.stored import STORED
from ..errors import MigrationError
from ..sql import Fragment, blocks
from .claims import Claims, space_of
from .passes import Obstacles, is_a_rows

BLOCKS = blocks("backfill")

BATCH_BYTES = 8 * 1024**2
UNIT = 64  # pages of heap
MOST_UNITS = 64  # claimed and read at once: 32 MiB of heap, how far one statement looks when there is little to find
MOST_HELD = 2 * MOST_UNITS  # by one worker, of the thousands of places in the lock table of the server

# the planner would rather hash or scan the whole table once per batch as long as it thinks that it is small
BY_TID = {
    "row_security": "off",
    "max_parallel_workers_per_gather": "0",
    "enable_tidscan": "on",
    **{
        f"enable_{way}": "off"
        for way in ("seqscan", "indexscan", "indexonlyscan", "bitmapscan", "hashjoin", "mergejoin")
    },
}
FROM = " FROM ONLY {table} WHERE ctid > '({page},{item})' AND ctid < '({end},0)' AND "
READ = FROM + STORED.pending("{size}") + " LIMIT {rows}"
READ_BACK = FROM + "{source} IS NULL AND {vector} IS NOT NULL LIMIT {rows}"

T = TypeVar("T")
Tid = tuple[int, int]
Unreadable = list[tuple[str, DBAPIError]]  # places of rows, and why

# whoever names a table in a query has it locked before anything is looked at
LOCKED_FILENODE = """
SELECT pg_catalog.pg_relation_filenode(CAST(:table AS regclass)) WHERE NOT EXISTS (SELECT FROM ONLY {table} WHERE false)
"""


@dataclass(frozen=True)
class Way:
    """Which column is filled from which: how rows are read, and in SQL what is written, as an array of which type."""

    value: str
    rows: str
    parse: Callable[[bytes | memoryview, int], Rows]
    written: str
    element: str

    @property
    def read(self) -> str:
        return f"SELECT ctid, xmin, {self.value}{self.rows}"

    @property
    def place(self) -> str:
        return f"SELECT CAST(ctid AS text){self.rows}"


FORTH = Way("{source}", READ, codec.parse, "{vector}", "{ext}.vector")
BACK = Way("{vector}", READ_BACK, codec.parse_vectors, "{source}", "bytea")


class Scan:
    """A walk over the pending rows of one length, in physical order, from one page to before another."""

    def __init__(self, dimensions: int, most_rows: int, first_page: int, end_page: int, way: Way = FORTH) -> None:
        self.way = way
        self.dimensions = dimensions
        self.most_rows = self.rows = STORED.batch(BATCH_BYTES, dimensions, most_rows)
        self.end_page = end_page
        self.position = (first_page, 0)  # the last tid that is done with: page, item

    @property
    def more(self) -> bool:
        return self.position[0] < self.end_page

    @property
    def _end(self) -> int:
        return min(self.position[0] + UNIT * MOST_UNITS, self.end_page)

    @property
    def names(self) -> dict[str, int]:
        """What the next read is to give, for the `{…}` of its SQL."""
        page, item = self.position
        return {"page": page, "item": item, "end": self._end, "size": self.dimensions, "rows": self.rows}

    def take(self, db: Database) -> tuple[Rows, Unreadable]:
        """The next rows, and the places of those before them that the server can't read."""

        def read() -> tuple[Rows, int, Tid | None]:
            rows = self.read(db)
            return rows, rows.rows_read, rows.last_tid

        return self.take_by(db, read, self.way.place)

    def take_by(
        self, db: Database, read: Callable[[], tuple[T, int, Tid | None]], place: str, **names: Fragment
    ) -> tuple[T, Unreadable]:
        """The same with what `read` gives: rows, how many, the last one's tid; `place` is SQL for the first's."""
        unreadable: Unreadable = []
        while True:
            try:
                with db.attempt():
                    rows, number, last = read()
                self.advance(number, last)
                return rows, unreadable
            except DBAPIError as error:
                if not is_a_rows(error):
                    raise
                if self.rows > 1:
                    self.rows //= 2
                else:
                    unreadable.append((self.pass_by(db, place, **names), error))

    def read(self, db: Database) -> Rows:
        return self.way.parse(db.copy_out(self.way.read, **self.names), self.dimensions)

    def advance(self, rows_read: int, last_tid: Tid | None) -> None:
        # fewer rows than asked for: nothing is left before the end of what was looked at
        full = rows_read == self.rows and last_tid is not None
        self.position = last_tid if full and last_tid else (self._end, 0)
        self.rows = min(2 * self.rows, self.most_rows)

    def pass_by(self, db: Database, sql: str, **names: Fragment) -> str:
        """Goes past the next row, which can't be read; returns its place, which takes no look at its value."""
        place = str(db.value(sql, **self.names, **names))
        page, item = place.strip("()").split(",")
        self.position = (int(page), int(item))
        return place


@dataclass(frozen=True)
class Converted:
    """One batch on its way from a reader to its writer: its good rows, and what COPY takes of them all."""

    part: Part
    rows: npt.NDArray[np.void]
    payload: bytes
    element_oid: int
    filenode: int
    rows_bad: int

    def some(self, first: int, end: int) -> bytes:
        """What COPY takes of some of the rows."""
        whole = (first, end) == (0, len(self.rows))
        return self.payload if whole else codec.encode(self.rows[first:end], self.element_oid, self.filenode)


class Gone(MigrationError):
    """A partition is no longer where it was: dropped, detached and renamed, or moved to another schema."""


@dataclass
class Reader:
    """Yields batches of pending rows from the units that nobody else has.

    Everything happens inside one transaction, which keeps the claims, but each read in a subtransaction that is rolled
    back: that releases its lock on the table, and between two reads no snapshot is held.
    """

    what: str  # for the log
    parts: Sequence[Part]  # with rows of their own
    way: Way
    column: str  # of the vectors
    dimensions: int
    most_rows: int
    element_oid: int
    lock_timeout: str
    claims: Claims
    table: Table
    obstacles: Obstacles
    held: int = 0

    def batches(self, db: Database) -> Iterator[Converted]:
        for part in self.parts:
            try:
                yield from self._batches(part.at(db), part)
            except Gone as gone:
                log.notice(f"{gone.message}: going on without it")
                db.rollback()
                self.held = 0
        db.rollback()

    def _batches(self, db: Database, part: Part) -> Iterator[Converted]:
        space = space_of(part.schema, part.name, self.column)
        pages = self._pages(db, part)
        units = -(-pages // UNIT)
        at_once = min(MOST_UNITS, max(1, units // 32))  # so that a few workers have their share of a small table
        for first in range(0, units, at_once):
            if self.held >= MOST_HELD:
                db.commit()
                self.held = 0
            db.outlive_timeouts(WHATEVER, batch=True)
            claimed = self.claims.take(db, space, range(first, min(first + at_once, units)))
            self.held += len(claimed)
            for start, end in runs(claimed):
                scan = Scan(self.dimensions, self.most_rows, start * UNIT, min(end * UNIT, pages), self.way)
                while scan.more:
                    rows, filenode = self._read(db, scan, part)
                    if rows.rows_read:
                        payload = codec.encode(rows.good, self.element_oid, filenode)
                        yield Converted(part, rows.good, payload, self.element_oid, filenode, rows.rows_bad)

    def _pages(self, db: Database, part: Part) -> int:
        """Of the table as it is now: what is added behind them is the next pass's."""

        def look() -> int:
            db.outlive_timeouts({**WHATEVER, "lock_timeout": LOCK_TIMEOUT}, batch=True)
            return pages_of(db)

        def undo() -> None:
            db.rollback()
            self.held = 0

        try:
            return db.patiently(look, undo)
        except DBAPIError as error:
            if part.gone(error):
                raise Gone(f"{self.what}: partition {part} is gone") from error
            raise

    def _read(self, db: Database, scan: Scan, part: Part) -> tuple[Rows, int]:
        """Tries again, with fewer rows, when a lock or a timeout of the role's was in the way."""
        tries = locks.BatchTries(db.stop.sleep)
        while True:
            before = scan.position
            try:
                with db.attempt(keep=False):
                    db.borrow()
                    db.set_local(by_tid("reading ahead", self.lock_timeout))
                    tries.heed(db)
                    # COPY takes its snapshot before its lock: behind a rewrite that it waited for it would see nothing
                    filenode = db.value(LOCKED_FILENODE, {"table": db.names["table"]})
                    rows, unreadable = scan.take(db)
                    for place, error in unreadable:
                        self.obstacles.refuse(error, keys_at(db, self.table, [place]))
                    return rows, filenode
            except DBAPIError as error:
                if part.gone(error):
                    raise Gone(f"{self.what}: partition {part} is gone") from error
                problem = locks.passing(error, self.what)
            scan.position, scan.rows = before, max(1, scan.rows // 2)
            tries.rest(problem, scan.rows)


@dataclass(frozen=True)
class Window:
    """Pages of one part, from the first to before the end."""

    part: Part
    first: int
    end: int


def windows(db: Database, parts: Sequence[Part]) -> list[Window]:
    """Each part as a whole, as it is now."""
    return [Window(part, 0, pages_of(part.at(db))) for part in parts]


def by_tid(doing: str, lock_timeout: str) -> dict[str, str]:
    """Settings of a transaction that reads and writes by tids, whatever the planner believes of the table's size."""
    return {**BY_TID, "application_name": f"{APPLICATION_NAME} {doing}", "lock_timeout": lock_timeout}


@contextmanager
def planned(db: Database, doing: str) -> Iterator[None]:
    """Reads by ranges of tids inside a transaction that does other things as well; its settings are put back."""
    with db.attempt(keep=False):
        timeout = db.value("SELECT current_setting('lock_timeout')")
        db.set_local(by_tid(doing, timeout))
        yield


def pages_of(db: Database) -> int:
    return int(
        db.value(
            BLOCKS.pages_of,
            {"table": db.names["table"]},
        )
    )


def runs(units: list[int]) -> Iterator[tuple[int, int]]:
    """Each run of consecutive units as first and end (exclusive)."""
    array: npt.NDArray[np.int64] = np.asarray(units, np.int64)
    for part in np.split(array, np.flatnonzero(np.diff(array) != 1) + 1):
        if len(part):
            yield int(part[0]), int(part[-1]) + 1
