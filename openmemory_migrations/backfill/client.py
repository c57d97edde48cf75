"""Converts on the client: reads bytes, re-encodes them with numpy and writes vectors, by binary COPY all the way.

A pass reads every table that holds rows in physical order, by ranges of tids, up to the page that is its last then: no
OFFSET, no index, no sort, and a batch costs the same in a small table and in a large one. A row that another
transaction moves behind the scan is found by the next pass.

A batch is read and converted on a connection of its own while the one before it is written. Its UPDATE asks for tid,
xmin and the table's file as they were when the row was read, and so never writes a value to a row that has changed.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial

import numpy as np
import numpy.typing as npt
from sqlalchemy.exc import DBAPIError

from ..db import catalog, locks, partitions
from ..db.context import VectorContext
from ..db.database import Database
from ..db.keys import keys_at
from ..db.partitions import Part
from ..db.sqlerrors import sqlstate
from ..db.threads import ahead, side_by_side
from ..encoding import codec
from ..sql import blocks
from .claims import Claims
from .pace import Pace
from .passes import UNCHANGED, BatchSize
from .progress import Progress
from .reader import FORTH, Converted, Reader, Way, by_tid
from .stage import REWRITTEN, Stage

BLOCKS = blocks("backfill")


class ClientEngine:
    """Works on the leaves of a partitioned table, which it finds anew for each pass."""

    def __init__(self, ctx: VectorContext, way: Way = FORTH) -> None:
        self.ctx, self.way = ctx, way
        with ctx.db.transaction():
            self.element_oid = catalog.vector_oid(ctx.db) if way is FORTH else codec.BYTEA
            self.lock_timeout = locks.batch_timeout(ctx.db, ctx.settings)

    def walk(self, dimensions: int, workers: list[Claims], progress: Progress, pace: Pace) -> None:
        with self.ctx.db.transaction():
            leaves = partitions.leaves(self.ctx.db, self.ctx.table.oid)

        def convert(db: Database, claims: Claims) -> None:
            reader = Reader(
                what=progress.what,
                parts=leaves,
                way=self.way,
                column=self.ctx.target.vector,
                dimensions=dimensions,
                most_rows=self.ctx.settings.backfill_batch,
                element_oid=self.element_oid,
                lock_timeout=self.lock_timeout,
                claims=claims,
                table=self.ctx.table,
                obstacles=progress.obstacles,
            )
            _Writer(self.ctx.by(db), self.lock_timeout, self.way, progress).take(reader, pace.on(db))

        side_by_side(self.ctx.db, [partial(convert, claims=claims) for claims in workers])


class _Writer:
    """Writes batch after batch, each in a transaction of its own, in smaller parts while something is in the way."""

    def __init__(self, ctx: VectorContext, lock_timeout: str, way: Way, progress: Progress) -> None:
        self.ctx, self.db, self.lock_timeout = ctx, ctx.db, lock_timeout
        self.way, self.progress = way, progress
        self.batch_size = BatchSize(ctx.db, progress.what, sys.maxsize)
        self.part: Part | None = None
        self.stage: Stage | None = None

    def take(self, reader: Reader, pace: Pace) -> None:
        pace.heed_slots()
        try:
            with ahead(self.db, reader.batches) as batches:
                for found in batches:
                    written = self._write(found, self._stage(found.part))
                    self.progress.add(self.db, written, found.rows_bad)
                    pace.rest(self.progress.what)
        finally:
            self._drop()

    def _stage(self, part: Part, *, with_sums: bool = False) -> Stage:
        if self.stage is None or part != self.part or with_sums:
            self._drop()
            with self.db.transaction():
                self.stage = Stage(part.at(self.db), self.ctx.extension.names(), self.way, with_sums=with_sums)
            self.part = part
        return self.stage

    def _drop(self) -> None:
        if self.stage is not None:
            with suppress(DBAPIError):  # a session that ends drops it as well
                self.stage.drop()

    def _write(self, found: Converted, stage: Stage) -> int:
        """How many rows have got their value."""
        first = written = 0
        while first < len(found.rows):
            end = min(first + self.batch_size.rows, len(found.rows))
            try:
                written += self._some(found, first, end, stage)
            except DBAPIError as error:
                if sqlstate(error) == REWRITTEN and not stage.with_sums:
                    stage = self._stage(found.part, with_sums=True)
                    continue
                if found.part.gone(error):
                    break  # the partition is gone; its reader says so
                outcome = self.batch_size.failed(error, end - first, can_care=True)
                if outcome != "again":
                    with self.db.transaction():
                        names = keys_at(found.part.at(self.db), self.ctx.table, tids_of(found.rows[first:end]))
                    self.progress.obstacles.pass_by(outcome, error, names)
                    first = end
            else:
                first = end
                self.batch_size.done()
        return written

    def _some(self, found: Converted, first: int, end: int, stage: Stage) -> int:
        with self.db.transaction(batch=True, settings=by_tid(self.progress.activity, self.lock_timeout)):
            self.batch_size.heed()
            if self.batch_size.careful:
                rows, payload = self._unlocked(found, first, end)
                self.progress.obstacles.lock(end - first - rows)
            else:
                rows, payload = end - first, found.some(first, end)
            self.db.as_host()
            written, kept = stage.write(payload) if rows else (0, [])
            names = keys_at(found.part.at(self.db), self.ctx.table, kept) if kept else []
        if rows:
            stage.committed()
        if names:
            self.progress.obstacles.refuse_for(UNCHANGED, names)
        return written

    def _unlocked(self, found: Converted, first: int, end: int) -> tuple[int, bytes]:
        """Those rows that nobody else has locked, which are ours now."""
        some = found.rows[first:end]
        tids = tids_of(some)
        ours = {tid for (tid,) in found.part.at(self.db).rows(BLOCKS.unlocked_rows, {"tids": tids})}
        chosen = some[[tid in ours for tid in tids]]
        return len(chosen), codec.encode(chosen, found.element_oid, found.filenode)


def tids_of(rows: npt.NDArray[np.void]) -> list[str]:
    return [codec.tid_text(tid) for tid in rows["tid"]]
