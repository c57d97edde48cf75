"""One column filled from another inside the server: in physical order, an UPDATE and a commit for a few pages.

The value is computed from the version of the row that is updated: a row that changes meanwhile is looked at again by
the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DBAPIError

from . import locks, log
from .catalog import Extension, Table
from .claims import Claims, space_of
from .database import Database
from .keys import keys_at
from .pace import Pace
from .partitions import Part
from .passes import UNCHANGED, Steps
from .progress import Progress
from .reading import MOST_UNITS, UNIT, by_tid

PLACES = 2048  # counted for a page: more than any page, of whatever size, has rows
INSIDE = "ctid >= '({page},{item})' AND ctid < '({end_page},{end_item})'"
UNLOCKED = "SELECT CAST(ctid AS text) FROM ONLY {table} WHERE {inside} AND {pending} FOR NO KEY UPDATE SKIP LOCKED"
OURS = "ctid = ANY (CAST(CAST(:tids AS text[]) AS tid[]))"
# a trigger may keep the row as it was, or change what is written
FILL = "UPDATE ONLY {table} SET {filled} = {value} WHERE {which} AND {pending}{fit} RETURNING {ok}, CAST(ctid AS text)"
LEFT = "SELECT CAST(ctid AS text), CAST(xmin AS text), {unfit} FROM ONLY {table} WHERE {inside} AND {pending}"


@dataclass(frozen=True)
class Filling:
    """What is filled from what, in SQL with the names of a `Database` and the extension's: the column, its value, which
    rows are `pending`, whether one that was updated is `ok`, and which of the pending are `unfit`: they stay."""

    filled: str
    value: str
    pending: str
    ok: str = "{ext}.vector_send({filled}) = {ext}.vector_send({value})"
    unfit: str | None = None

    def names(self, db: Database, **ext: str) -> dict[str, str]:
        own = {"filled": self.filled, "value": self.value, "pending": self.pending, "unfit": self.unfit or "false"}
        names = {name: db.sql(text, **ext) for name, text in own.items()}
        names["ok"] = db.sql(self.ok, **ext, **names)
        names["fit"] = f" AND NOT ({names['unfit']})" if self.unfit else ""
        return names


@dataclass
class Walk:
    """Over one table that holds rows. With `claims` others walk there as well, each at other pages; `spread` over nodes
    it has a row of each place in each of its shards, and none can be left out while it is locked."""

    db: Database
    table: Table
    extension: Extension
    part: Part
    filling: Filling
    lock_timeout: str
    most_rows: int
    progress: Progress
    pace: Pace | None = None
    claims: tuple[Claims, str] | None = None  # and the column that they are for
    spread: bool = False
    within: Callable[[Database, Extension], AbstractContextManager[None]] | None = None  # around what a batch does

    def take(self, last_page: int) -> None:
        place = 0  # a page and a row's place in it, as one number
        self.steps = Steps(self.db, self.progress.what, UNIT * MOST_UNITS * PLACES, "places")
        self.steps.size = PLACES
        while place < last_page * PLACES:
            try:
                end, filled, bad = self._batch(place)
            except DBAPIError as error:
                if self.part.gone(error):
                    log.notice(f"{self.progress.what}: partition {self.part} is gone")
                    return
                outcome = self.steps.failed(error, self.steps.size, can_care=not self.spread)
                if outcome != "again":
                    self.progress.obstacles.pass_by(outcome, error, self._keys([_tid(place)]))
                    place += 1
                continue
            self.steps.done()
            if filled:  # rows lie evenly, more or less
                self.steps.size = max(1, min(self.steps.size, (end - place) * self.most_rows // filled))
            place = end
            if filled or bad:
                self.progress.add(self.db, filled, bad)
            if filled and self.pace:
                self.pace.rest(self.progress.what)

    def _batch(self, place: int) -> tuple[int, int, int]:
        """Where it has ended, how many rows have got their value, and how many are unfit."""
        names = self.filling.names(self.db, **self.extension.names())
        at = self.part.at(self.db)
        with self.db.transaction(batch=True, settings=by_tid(self.progress.activity, self.lock_timeout)):
            if self.spread:
                locks.set_timeout(self.db, self.lock_timeout)
            self.steps.heed()
            end = self._claimed(place)
            if not end:
                return (place // (UNIT * PLACES) + 1) * UNIT * PLACES, 0, 0
            names["inside"] = INSIDE.format(**_bounds(place, end))
            with self.within(self.db, self.extension) if self.within else nullcontext():
                done, kept, bad = self._fill(at, names)
            keys = keys_at(at, self.table, kept) if kept else []
        if keys:
            self.progress.obstacles.refuse_for(UNCHANGED, keys)
        return end, sum(done.values()), bad

    def _fill(self, at: Database, names: dict[str, str]) -> tuple[dict[str, bool], list[str], int]:
        """The places of rows that were updated, and whether they have got their value; those that a trigger keeps as
        they were; and how many are unfit."""
        if self.steps.careful:
            tids = [tid for (tid,) in at.rows(UNLOCKED, **names)]
            self.progress.obstacles.lock(1)  # or it would not have come to this
            done = _filled(at.rows(FILL.replace("{which}", OURS), {"tids": tids}, **names))
        else:
            done = _filled(at.rows(FILL.replace("{which}", "{inside}"), **names))
        kept, bad = [tid for tid, ok in done.items() if not ok], 0
        if self.filling.unfit:
            left = [(tid, version, unfit) for tid, version, unfit in at.rows(LEFT, **names) if tid not in done]
            bad = sum(unfit for _, _, unfit in left)
            if bad < len(left) and not self.steps.careful:
                # there before an UPDATE and after it, as it was: kept so by a trigger, and by nobody else
                done |= _filled(at.rows(FILL.replace("{which}", "{inside}"), **names))
                again = {(tid, version) for tid, version, _ in at.rows(LEFT, **names)}
                kept += [tid for tid, version, unfit in left if not unfit and (tid, version) in again]
        return done, kept, bad

    def _claimed(self, place: int) -> int | None:
        """The end of the batch: of as many units as are ours; None where others are at the first."""
        end = place + self.steps.size
        if self.claims is None:
            return end
        first = place // (UNIT * PLACES)
        units = range(first, (end - 1) // (UNIT * PLACES) + 1)
        claims, column = self.claims
        ours = set(claims.take(self.db, space_of(self.part.schema, self.part.name, column), units))
        until = next((unit for unit in units if unit not in ours), units.stop)
        return min(end, until * UNIT * PLACES) if until > first else None

    def _keys(self, tids: list[str]) -> list[str]:
        with self.db.transaction():
            return keys_at(self.part.at(self.db), self.table, tids)


def _filled(rows: Sequence[Any]) -> dict[str, bool]:
    return {tid: ok is True for ok, tid in rows}


def _tid(place: int) -> str:
    return "({},{})".format(*divmod(place, PLACES))


def _bounds(place: int, end: int) -> dict[str, int]:
    (page, item), (end_page, end_item) = divmod(place, PLACES), divmod(end, PLACES)
    return {"page": page, "item": item, "end_page": end_page, "end_item": end_item}
