"""One column filled from another inside the server: in physical order, an UPDATE and a commit for a few pages.

The value is computed from the version of the row that is updated: a row that changes meanwhile is looked at again by
the server.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import citus, locks, partitions
from ..db.catalog import Extension
from ..db.context import VectorContext
from ..db.database import Database
from ..db.keys import AT, SUM, keys_at
from ..db.partitions import Part
from ..sql import SQL, blocks, unquote
from .claims import Claims, space_of
from .pace import Pace
from .passes import OVERRULED, UNCHANGED, BatchSize, is_a_rows
from .progress import Progress
from .reader import MOST_UNITS, UNIT, by_tid, pages_of
from .stage import Triggers, others_triggers

BLOCKS = blocks("backfill")

PLACES = 2048  # counted for a page: more than any page, of whatever size, has rows
UNLOCKED = "SELECT CAST(ctid AS text) FROM ONLY {table} WHERE {inside} AND {pending} FOR NO KEY UPDATE SKIP LOCKED"
OURS = "ctid = ANY (CAST(CAST(:tids AS text[]) AS tid[]))"
OTHERS = "{inside} AND ctid <> ALL (CAST(CAST(:tids AS text[]) AS tid[]))"
FILL = "UPDATE ONLY {table} SET {filled} = {value} WHERE {which} AND {pending}{fit} RETURNING CAST(ctid AS text)"
STILL = f"SELECT count(*) FROM ONLY {{table}} WHERE {AT}"
# what triggers have made of rows before their UPDATE
FILLED = f"SELECT CAST(ctid AS text), {{ok}} FROM ONLY {{table}} WHERE {AT}"
FAIL = f"SELECT {OVERRULED.format(tid='true')}"
LEFT = "SELECT CAST(ctid AS text), CAST(xmin AS text), {unfit} FROM ONLY {table} WHERE {inside} AND {pending}"


@dataclass(frozen=True)
class Filling:
    """What is filled from what, in SQL with the names of a `Database` and the extension's: the column, its value, which
    rows are `pending`, which of these are `unfit` and stay, of which filled ones that is seen (`misfit`), and what has
    to be `kept` as it is, of type bytea."""

    filled: str
    value: str
    pending: str
    kept: str
    unfit: str | None = None
    misfit: str = "false"

    def names(self, db: Database, **ext: SQL) -> dict[str, SQL]:
        own = {"filled": self.filled, "value": self.value, "pending": self.pending, "kept": self.kept}
        own |= {"unfit": self.unfit or "false", "misfit": self.misfit}
        names = {name: db.sql(text, **ext) for name, text in own.items()}
        names["ok"] = db.sql("{ext}.vector_send({filled}) = {ext}.vector_send({value})", **ext, **names)
        names["fit"] = db.sql(" AND NOT ({unfit})" if self.unfit else "", **names)
        names["kept_sum"] = db.sql(SUM.format(it="{kept}"), **names)
        names["overruled"] = db.sql(OVERRULED.format(tid="ctid"))
        return names


@dataclass(frozen=True)
class Batch:
    """Up to before a place, with so many pending rows, the last of them at another."""

    end: int
    rows: int
    last: int = 0


class _Rewritten(Exception):
    """A trigger has written rows of the batch once more, when its UPDATE was done."""


class _Misfit(Exception):
    """A row of the batch has got a value that it must not have."""


def fill(
    ctx: VectorContext,
    filling: Filling,
    most_rows: int,
    progress: Progress,
    pace: Pace | None = None,
    claims: tuple[Claims, str] | None = None,
    within: Callable[[Database, Extension], AbstractContextManager[None]] | None = None,
) -> None:
    """Goes once over every table that holds rows, on the context's connection. With `claims` others walk there as well,
    for the same column, each at other pages; `within` is around what a batch does."""
    with ctx.db.transaction():
        leaves = partitions.leaves(ctx.db, ctx.table.oid)
        lock_timeout = locks.batch_timeout(ctx.db, ctx.settings)
        spread = bool(citus.shards(ctx.db, ctx.table.oid))
    if pace:
        pace.heed_slots()
    for part in leaves:
        Walk(ctx, part, filling, lock_timeout, most_rows, progress, pace, claims, spread, within).take()


@dataclass
class Walk:
    """Over one table that holds rows. `spread` over nodes it has a row of each place in each of its shards, and none
    can be left out while it is locked."""

    ctx: VectorContext
    part: Part
    filling: Filling
    lock_timeout: str
    most_rows: int
    progress: Progress
    pace: Pace | None
    claims: tuple[Claims, str] | None
    spread: bool
    within: Callable[[Database, Extension], AbstractContextManager[None]] | None

    @property
    def db(self) -> Database:
        return self.ctx.db

    def take(self) -> None:
        try:
            self._take()
        except DBAPIError as error:
            if not self.part.gone(error):
                raise
            log.notice(f"{self.progress.what}: partition {self.part} is gone")

    def _take(self) -> None:
        place = 0  # a page and a row's place in it, as one number
        self.batch_size = BatchSize(self.db, self.progress.what, self.most_rows)
        self.reach = 1  # units that a batch is looked for in
        at, self.rewritten = self.part.at(self.db), False
        with self.db.transaction():
            last_page = citus.pages(self.db, self.ctx.table.oid) if self.spread else pages_of(at)
            self.triggers = Triggers() if self.spread else others_triggers(at, at.sql(self.filling.filled))
        # whole batches, without a look at the values beforehand
        self.at_once = not self.spread and self.triggers == Triggers()
        while place < last_page * PLACES:
            try:
                filled, bad = self._batch(place)
            except _Rewritten:
                self.rewritten = True
                continue
            except _Misfit:
                self.at_once = False
                continue
            except DBAPIError as error:
                if self.part.gone(error):
                    raise
                if self.at_once and is_a_rows(error):  # perhaps of one that is unfit, and stays
                    self.at_once = False
                    continue
                outcome = self.batch_size.failed(error, self.batch.rows, can_care=not self.spread)
                if outcome != "again":
                    place = self.batch.last + 1
                    self.progress.obstacles.pass_by(outcome, error, self._keys([_tid(self.batch.last)]))
                continue
            self.batch_size.done()
            place = self.batch.end
            if filled or bad:
                self.progress.add(self.db, filled, bad)
            if filled and self.pace:
                self.pace.rest(self.progress.what)

    def _batch(self, place: int) -> tuple[int, int]:
        """How many rows have got their value, and how many are unfit."""
        names = self.filling.names(self.db, **self.ctx.extension.names())
        at = self.part.at(self.db)
        self.batch = Batch(place, self.batch_size.rows, place)
        with self.db.transaction(batch=True, settings=by_tid(self.progress.activity, self.lock_timeout)):
            if self.spread:
                locks.set_timeout(self.db, self.lock_timeout)
            self.batch_size.heed()
            self.batch = self._chosen(at, place, names)
            if not self.batch.rows:
                return 0, 0
            names["inside"] = _inside(place, self.batch.end)
            with self.within(self.db, self.ctx.extension) if self.within else nullcontext():
                filled, kept, bad = self._fill(at, names)
            keys = keys_at(at, self.ctx.table, kept) if kept else []
        if keys:
            self.progress.obstacles.refuse_for(UNCHANGED, keys)
        return filled, bad

    def _chosen(self, at: Database, place: int, names: dict[str, SQL]) -> Batch:
        """The next pending rows in as many units as are ours, none where others are at the first."""
        end = self._claimed(place)
        if not end:
            return Batch((place // (UNIT * PLACES) + 1) * UNIT * PLACES, 0)
        most = self.batch_size.rows
        # each shard is read by its places, one after the other
        order = SQL(" ORDER BY ctid" if self.spread else "")
        ((tid, rows),) = at.rows(BLOCKS.next, inside=_inside(place, end), most=most, order=order, **names)
        last = _place(tid) if rows else 0
        if rows < most:
            self.reach = min(2 * self.reach, MOST_UNITS)
            return Batch(end, rows, last)
        self.reach = (last - place) // (UNIT * PLACES) + 2  # the first of them may be half done
        return Batch(last + 1, rows, last)

    def _fill(self, at: Database, names: dict[str, SQL]) -> tuple[int, list[str], int]:
        """How many rows have got their value; the places of those that a trigger keeps from it; how many are unfit."""
        if self.at_once and not self.batch_size.careful:
            # or another could begin to build an index between our look and our UPDATE
            at.run("LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE")
            self.at_once = not at.value(
                BLOCKS.indexed, {"table": at.names["table"], "column": unquote(names["filled"])}
            )
        at.as_host()
        if self.at_once and not self.batch_size.careful:
            ((filled, misfit),) = at.rows(BLOCKS.fill_all, **names)
            if misfit:
                raise _Misfit
            return filled, [], 0
        if self.batch_size.careful:
            tids = [tid for (tid,) in at.rows(UNLOCKED, **names)]
            self.progress.obstacles.lock(1)  # or it would not have come to this
            done = self._update(at, names, OURS, tids)
        else:
            done = self._update(at, names, "{inside}")
        kept, bad = list[str](), 0
        if self.filling.unfit:
            left = [(tid, version, unfit) for tid, version, unfit in at.rows(LEFT, **names) if tid not in done]
            bad = sum(unfit for _, _, unfit in left)
            if bad < len(left) and not self.batch_size.careful:
                # there before an UPDATE and after it, as it was: kept so by a trigger, and by nobody else
                done |= self._update(at, names, OTHERS, list(done))
                again = {(tid, version) for tid, version, _ in at.rows(LEFT, **names)}
                kept += [tid for tid, version, unfit in left if not unfit and (tid, version) in again]
        return len(done), kept, bad

    def _update(self, at: Database, names: dict[str, SQL], which: str, tids: list[str] | None = None) -> Set[str]:
        """The places of the rows when all triggers have fired. Each has to have its value, and its bytes, also where it
        was written once more, and one that was not written has to be where it was: the batch fails otherwise."""
        parameters = {} if tids is None else {"tids": tids}
        with_sums = self.triggers.before or self.rewritten
        if with_sums:
            rows = at.rows(BLOCKS.fill_among_triggers.replace("{which}", which), parameters, **names)
            written = {tid: sum for _, tid, sum in rows if tid}
            kept = {was_at for was_at, tid, _ in rows if not tid} - {was_at for was_at, tid, _ in rows if tid}
            if kept and at.value(STILL, {"values": list(kept)}) < len(kept):
                at.run(FAIL)
        else:
            written = {tid: None for (tid,) in at.rows(FILL.replace("{which}", which), parameters, **names)}
        if not written or self.triggers == Triggers():
            return written.keys()
        # what is deferred would fire after we have looked; only now, as it may be in order at the end only
        self.db.run("SET CONSTRAINTS ALL IMMEDIATE")
        ok = names["ok"] if self.triggers.before else True
        done = {tid: right is True for tid, right in at.rows(FILLED, {"values": list(written)}, **{**names, "ok": ok})}
        if not all(done.values()):
            at.run(FAIL)
        gone = [tid for tid in written if tid not in done]
        if not gone:
            return done.keys()
        if not with_sums:
            raise _Rewritten
        found = at.rows(BLOCKS.filled_elsewhere, {"values": gone}, table_text=at.names["table"], **names)
        right = {is_at for was_at, is_at, ok, kept in found if ok is True and kept == written[was_at]}
        if len(right) < len(gone):
            at.run(FAIL)
        return done.keys() | right

    def _claimed(self, place: int) -> int | None:
        """How far the pages may be looked through: as many units as are ours; None where others are at the first."""
        first = place // (UNIT * PLACES)
        units = range(first, first + self.reach)
        if self.claims is None:
            return units.stop * UNIT * PLACES
        claims, column = self.claims
        ours = set(claims.take(self.db, space_of(self.part.schema, self.part.name, column), units))
        until = next((unit for unit in units if unit not in ours), units.stop)
        return until * UNIT * PLACES if until > first else None

    def _keys(self, tids: list[str]) -> list[str]:
        with self.db.transaction():
            return keys_at(self.part.at(self.db), self.ctx.table, tids)


def _tid(place: int) -> str:
    return "({},{})".format(*divmod(place, PLACES))


def _place(tid: str) -> int:
    page, item = map(int, tid.strip("()").split(","))
    return page * PLACES + item


def _inside(place: int, end: int) -> SQL:
    return SQL(f"ctid >= '{_tid(place)}' AND ctid < '{_tid(end)}'")
