"""What a table's rows hold, before anything is changed: lengths, dimensions, what can't be converted and why.

One pass counts, at whatever number of rows and partitions; a second one, in short transactions, reads the values of one
length, for NaN and infinite values. Both look at a sample of the pages if told to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from sqlalchemy.exc import DBAPIError

from .. import console
from ..backfill.leftovers import DIFFERS, LOOK_ROWS, NOT_FINITE, Counted, first_keys, has_dim, read
from ..backfill.reader import Scan, by_tid, pages_of
from ..db import locks, partitions
from ..db.context import TableContext
from ..db.database import Database
from ..db.partitions import Part
from ..db.sqlerrors import PASSING, sqlstate
from ..encoding import dimensions
from ..encoding.stored import STORED
from ..settings import Settings
from ..sql import SQL, blocks

BLOCKS = blocks("preflight")

LEAST_PAGES = 50  # of a sample: TABLESAMPLE SYSTEM takes each page or not, and of a few pages perhaps none
RUNS = 16  # places in each table that holds rows at which the values of a sample are read
MOST_LENGTHS = 3  # whose values are read where the dimensions aren't known: each costs a pass

PLANNED = "EXPLAIN (FORMAT JSON) SELECT FROM {table}"


@dataclass(frozen=True)
class Sizes:
    """Bytes, of the table or of all its partitions."""

    table: int
    indexes: int
    toast: int


@dataclass(frozen=True)
class Lengths:
    """Rows by the length of `v`, all and those without a vector; counted among `looked_at` of `total` rows."""

    total: int  # estimated, where not all were looked at
    looked_at: int
    share: float  # of the pages
    all: Counter[int]
    pending: Counter[int]
    without_source: int
    dim_differs: int

    def whole(self, rows: int) -> int:
        """As many in the table as `rows` of those looked at."""
        return rows if self.share == 1 else round(rows * self.total / max(1, self.looked_at))


@dataclass
class Bad:
    """Pending rows that can't be vectors, among those looked at: how many by reason, and the first few keys.

    Beside them those that the server can't read.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    keys: dict[str, list[str]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    def summary(self) -> str:
        return "; ".join(
            f"{reason}: {rows:,}" + (f" (such as {', '.join(self.keys[reason])})" if self.keys.get(reason) else "")
            for reason, rows in self.reasons.most_common()
        )


@contextmanager
def looking(db: Database, settings: Settings) -> Iterator[None]:
    """One short read-only snapshot of the rows, in which nothing waits for a lock longer than a step would."""
    with db.transaction(snapshot=True, lock_timeout_ms=settings.lock_timeout_ms):
        locks.set_timeout(db, f"{settings.lock_timeout_ms}ms")
        yield


@dataclass(frozen=True)
class Look:
    """How to look at one table; `sample` is about how many rows to look at, None for all of them."""

    ctx: TableContext
    sample: int | None

    @classmethod
    def at(cls, ctx: TableContext, sample: int | None) -> Look:
        column = ctx.table.columns.get(ctx.target.vector)
        # where no row has a vector of ours, {vector} IS NULL has to be true of all
        ours = column is not None and column.ours
        return cls(ctx if ours else ctx.by(ctx.db.at({"vector": SQL("NULL")})), sample)

    def _looking(self) -> AbstractContextManager[None]:
        return looking(self.ctx.db, self.ctx.settings)

    def sizes(self) -> Sizes:
        with self._looking():
            tables = [part.oid for part in partitions.leaves(self.ctx.db, self.ctx.table.oid)]
            return Sizes(*self.ctx.db.rows(BLOCKS.sizes, {"tables": tables})[0])

    def lengths(self, sizes: Sizes) -> Lengths:
        differs = self.ctx.db.sql(DIFFERS) if has_dim(self.ctx.target, self.ctx.table) else False
        with self._looking():
            share, planned = self._share(sizes)
            found = self._sampled(share).rows(BLOCKS.lengths, length=self.ctx.db.sql(STORED.length), differs=differs)
        looked_at = sum(row[1] for row in found)
        with_source = [row for row in found if row[0] is not None]
        return Lengths(
            total=looked_at if share == 1 else max(planned, looked_at),
            looked_at=looked_at,
            share=share,
            all=Counter({octets: rows for octets, rows, _, _ in with_source}),
            pending=Counter({octets: pending for octets, _, pending, _ in with_source if pending}),
            without_source=looked_at - sum(row[1] for row in with_source),
            dim_differs=sum(row[3] for row in with_source),
        )

    def sourceless(self, lengths: Lengths, column: SQL, **names: SQL) -> Counter[int]:
        """Of an adopted (quoted) column."""
        with self._looking():
            return dimensions.sourceless(self._sampled(lengths.share), column, **names)

    def bad(self, lengths: Lengths, size: int | None) -> Bad:
        """`size` as it is to become, None where that isn't known."""
        bad, by_reason = Bad(), dict[str, list[int]]()
        for octets, rows in sorted(lengths.pending.items()):
            if reason := STORED.problem(octets, size):
                bad.reasons[reason] += rows
                by_reason.setdefault(reason, []).append(octets)
        for reason, values in by_reason.items():
            with self._looking():
                sampled = self._sampled(lengths.share)
                bad.keys[reason] = first_keys(sampled, self.ctx.table, f"{STORED.length} = ANY (:values)", values)
        good = Counter(
            {octets: rows for octets, rows in sorted(lengths.pending.items()) if not STORED.problem(octets, size)}
        )
        for octets, rows in good.most_common(MOST_LENGTHS):
            found = self._read(STORED.dimensions(octets), lengths.share)
            bad.unreadable += found.unreadable
            if found.bad:
                # of a sample the values that are read aren't those that were counted
                bad.reasons[NOT_FINITE] += (
                    found.bad if lengths.share == 1 else max(1, round(rows * found.bad / (found.good + found.bad)))
                )
                bad.keys.setdefault(NOT_FINITE, []).extend(found.keys)
        return bad

    def overflows_half(self, lengths: Lengths, size: int) -> tuple[int, list[str]]:
        """Rows of so many dimensions that hold what an index on halfvec can't, among those looked at, and the first
        few keys."""
        condition = f"CASE WHEN {STORED.of(size)} THEN {STORED.overflows_half} ELSE false END"
        with self._looking():
            sampled = self._sampled(lengths.share)
            rows = int(sampled.value("SELECT count(*) FROM {table} WHERE " + condition))
            return rows, first_keys(sampled, self.ctx.table, condition, []) if rows else []

    def _read(self, size: int, share: float) -> Counted:
        found = Counted(0, 0, [])
        with self._looking():
            leaves = [part.at(self.ctx.db) for part in partitions.leaves(self.ctx.db, self.ctx.table.oid)]
            runs = [(at, first, end) for at in leaves for first, end in runs_of(pages_of(at), share)]
        total, done = sum(end - first for _, first, end in runs), 0
        with console.shown(f"checking {self.ctx.target.table}", total, "pages") as shown:
            for at, first, end in runs:
                scan = Scan(size, LOOK_ROWS, first, end)

                @contextmanager
                def batch(before: int = done - first, scan: Scan = scan) -> Iterator[None]:
                    shown.to(before + scan.position[0])
                    with self._looking():
                        timeout = self.ctx.db.value("SELECT current_setting('lock_timeout')")
                        self.ctx.db.set_local(by_tid("looking at the rows", timeout))
                        yield

                found = read(at, self.ctx.table, scan, found, batch)
                done += end - first
        return found

    def _share(self, sizes: Sizes) -> tuple[float, int]:
        """Of the pages that are to be looked at, and the rows that the planner expects in all of them."""
        if self.sample is None:
            return 1.0, 0
        planned = self.ctx.db.value(PLANNED)[0]["Plan"]["Plan Rows"]
        pages = sizes.table // self.ctx.db.value("SELECT CAST(current_setting('block_size') AS integer)")
        return min(1.0, max(self.sample / max(1, planned), LEAST_PAGES / max(1, pages))), planned

    def _sampled(self, share: float) -> Database:
        """With the same pages each time."""
        if share == 1:
            return self.ctx.db
        sampled = f"{{table}} TABLESAMPLE SYSTEM ({100 * share:.9f}) REPEATABLE (1)"
        return self.ctx.db.at({"table": self.ctx.db.sql(sampled)})


def runs_of(pages: int, share: float) -> list[tuple[int, int]]:
    """First and end (exclusive) of some runs of pages, evenly spread, that are such a share of all."""
    if share == 1 or not pages:
        return [(0, pages)]
    runs = min(RUNS, math.ceil(pages * share))
    starts = [pages * number // runs for number in range(runs)]
    each = math.ceil(pages * share / runs)
    return [(start, min(start + each, end)) for start, end in zip(starts, [*starts[1:], pages], strict=True)]


def held(ctx: TableContext, unconverted: str) -> Iterator[tuple[Part, str, int | None]]:
    """Constraints that were never validated, on which table, and how many rows that are to be updated violate them.

    None where one can't be evaluated: the server's words might show what is in a row.
    """
    db = ctx.db
    with db.transaction():
        leaves = {part.oid: part for part in partitions.leaves(db, ctx.table.oid)}
        found = list(db.rows(BLOCKS.not_valid, {"tables": list(leaves)}))
    for oid, name, holds in found:
        at = leaves[oid].at(db)
        rows: int | None
        try:
            with db.transaction():
                db.run("SET TRANSACTION READ ONLY")
                locks.set_timeout(db, f"{ctx.settings.lock_timeout_ms}ms")
                db.as_host()  # for its functions
                rows = at.value(BLOCKS.held, unconverted=at.sql(unconverted), holds=SQL(holds))
        except DBAPIError as error:
            if error.connection_invalidated or sqlstate(error) in PASSING:
                raise
            rows = None
        if rows != 0:
            yield leaves[oid], name, rows
