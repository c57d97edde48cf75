"""Passes over a table until nothing is left to write, and what becomes of the rows that can't be written.

A batch that fails is taken again in halves, down to the one row that is in the way: that is passed by and named at the
end, and all others are done. A pass that changes nothing is the last one.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import locks, tries
from ..db.catalog import Table
from ..db.database import Database
from ..db.keys import SHOWN_KEYS, keys_where
from ..db.sqlerrors import (
    DEADLOCK,
    DENIED,
    LOCK_NOT_AVAILABLE,
    PASSING,
    constraint_of,
    context_of,
    functions_of,
    in_statement,
    sqlstate,
)
from ..errors import MigrationError, TryAgain

MOST_IN_A_ROW = 10_000  # rows that are refused, one by one, with none in between that is not
MOST_NAMED = 1000  # rows that are refused for one reason whose names are kept
MOST_IDLE = 2  # passes in a row that change nothing though nothing is known to be in the way: a row may move past one
MOST_WITHOUT_END = 100  # passes that change rows and leave no fewer than one before: others go on writing past us
LOCKED = (LOCK_NOT_AVAILABLE, DEADLOCK)
UNCHANGED = "no error, by a trigger or rule of the table's that keeps a row as it was or changes the value or the row"
# fails where a trigger sets it once more; not a constant, which would fail when it is planned
OVERRULED = "sqrt(CAST(- pg_catalog.pg_column_size({tid}) AS float8)) IS NULL"
OF_OVERRULED = "2201F"
# classes of SQLSTATE: of connections, transactions, resources and the server; of rights and states, which are no row's
# fault either, unless a function raises them; and of names, which a row may have in it, cast to regclass or jsonpath
OF_THE_SERVER = ("08", "25", "28", "3D", "40", "53", "57", "58P01")
NOT_A_ROWS = ("0A", "26", "34", DENIED, "55")
OF_NAMES = ("3F", "42")


def is_a_rows(error: DBAPIError) -> bool:
    """Whether the server may refuse, or fail to read, some of the rows only: by a constraint, a trigger, a bad page.

    Whatever a function of others' raises is about a row, but for what is of the server.
    """
    state = sqlstate(error)
    if state is None or error.connection_invalidated:
        return False
    if state in PASSING or state.startswith(OF_THE_SERVER):
        return raised(error)
    ours = state.startswith(NOT_A_ROWS) or (state.startswith(OF_NAMES) and in_statement(error))
    return not ours or bool(functions_of(error))


def reason_of(error: DBAPIError) -> str:
    """What a row is refused with; never the server's own words, which may show what is in the row."""
    if sqlstate(error) == OF_OVERRULED and not functions_of(error):
        return UNCHANGED
    text = f"SQLSTATE {sqlstate(error)}"
    if constraint := constraint_of(error):
        text += f', constraint "{constraint}"'
    if theirs := functions_of(error):
        text += f", in function {theirs[0]}"
    return text


def raised(error: DBAPIError) -> bool:
    """Whether it is a function's own word, and not the server's: there another try says the same of the row."""
    innermost = (context_of(error) or "").split("\n", 1)[0]
    return "RAISE" in innermost and bool(functions_of(error))


@dataclass
class Obstacles:
    """What a pass came upon, told by any of its workers: rows by the reason why they were passed by."""

    refused: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0  # that were refused
    locked: int = 0
    waits: dict[str, str] = field(default_factory=dict)  # of what isn't a lock on a row: why, and one that waits
    _in_a_row: int = 0
    _counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pass_by(self, outcome: Literal["refused", "locked"], error: DBAPIError, names: Sequence[str]) -> None:
        """One row, as `BatchSize.failed` has it. Raises MigrationError as `refuse_for`."""
        if outcome == "refused":
            self.refuse(error, names)
            return
        self.lock(1)
        with self._lock:
            self.waits.setdefault(reason_of(error), ", ".join(names))

    def refuse(self, error: DBAPIError, names: Sequence[str]) -> None:
        self.refuse_for(reason_of(error), names)

    def refuse_for(self, reason: str, names: Sequence[str]) -> None:
        """Raises MigrationError where it is no matter of single rows."""
        with self._lock:
            kept = self.refused.setdefault(reason, [])
            # a pass may come upon a row once more that a trigger has changed
            names = [name for name in names if name not in kept]
            self.rows += len(names)
            self._in_a_row += len(names)
            self._counts[reason] += len(names)
            kept += names[: MOST_NAMED - len(kept)]
            if self._in_a_row > MOST_IN_A_ROW:
                raise MigrationError(
                    f"more than {MOST_IN_A_ROW:,} rows in a row are refused; what is committed is kept",
                    detail=f"{self.summary()}.",
                    hint="Mend what refuses them, then run the same command again.",
                )

    def wrote(self) -> None:
        """Not all rows are refused."""
        with self._lock:
            self._in_a_row = 0

    def lock(self, rows: int) -> None:
        with self._lock:
            self.locked += rows

    def waiting(self) -> str:
        """What rows have waited for that nobody has locked themselves."""
        return "; ".join(f"{name} failed with {reason}" for reason, name in self.waits.items())

    def summary(self) -> str:
        return "; ".join(
            f"{shown(names, self._counts[reason])} refused with {reason}" for reason, names in self.refused.items()
        )


def shown(names: Sequence[str], rows: int | None = None) -> str:
    """How many rows, and the first few of them by name."""
    rows = len(names) if rows is None else rows
    few = ", ".join(names[:SHOWN_KEYS])
    return f"{rows:,}" + (f" (such as {few})" if few else "")


class BatchSize:
    """How many rows, or places, are taken at once: half as many after a failure, twice as many after a success."""

    def __init__(self, db: Database, doing: str, most: int, unit: str = "rows") -> None:
        self.most = self.rows = max(1, most)
        self.careful = False  # what somebody has locked is to be left out
        self._db, self._doing, self._unit = db, doing, unit
        self._begin()

    def _begin(self) -> None:
        self._tries, self.careful = locks.BatchTries(self._db.stop.sleep), False
        self._alone = False  # one row has been tried by itself

    def done(self) -> None:
        self.rows = min(2 * self.rows, self.most)
        self._begin()

    def heed(self) -> None:
        """Inside the transaction of a batch."""
        self._tries.heed(self._db)

    def failed(self, error: DBAPIError, took: int, *, can_care: bool = False) -> Literal["again", "refused", "locked"]:
        """What becomes of the batch, which took so many: another try, smaller or with more care, or its one row is
        passed by. Raises MigrationError where no other try can help, or after the last one.
        """
        if is_a_rows(error):
            if took == 1:
                self._begin()
                return "refused"
            self.rows = took // 2
            return "again"
        problem = locks.passing(error, self._doing)
        if sqlstate(error) in LOCKED and can_care and not self.careful:
            self.careful = True
            return "again"
        if took == 1 and self._alone:
            self._begin()
            return "locked"
        self._alone = took == 1
        self.rows = max(1, took // 2)
        if sqlstate(error) not in LOCKED:
            self._tries.rest(problem, self.rows, self._unit)
        return "again"


def passes(
    db: Database, table_oid: int, what: str, once: Callable[[Obstacles], tuple[int, int]]
) -> tuple[Obstacles, int]:
    """Goes over the table by `once` until nothing is left, or a pass has changed nothing.

    `once` returns how many rows it has changed, and how many are left to change, counted before it or after. Returns
    what is in the way of so many rows. Raises TryAgain where that is somebody's lock, for too long.
    """
    pauses, idle, least, no_fewer = tries.pauses(), 0, sys.maxsize, 0
    while True:
        obstacles = Obstacles()
        changed, left = once(obstacles)
        if not left:
            return Obstacles(), 0
        least, no_fewer = (left, 0) if left < least else (least, no_fewer + 1)
        if changed and no_fewer < MOST_WITHOUT_END:
            pauses, idle = tries.pauses(), 0
            continue
        if obstacles.locked:
            holders = locks.table_holders(db, table_oid)
            if waiting := obstacles.waiting():
                holders = f"{waiting}. {holders}"
            if (pause := next(pauses, None)) is not None:
                log.notice(f"{what}: rows are locked, another pass in {pause:.1f} s", detail=holders)
                db.stop.sleep(pause)
                continue
            raise TryAgain(
                f"{what}: {left:,} rows are left, and rows stay locked by somebody; what is committed is kept",
                detail=f"{obstacles.summary()}. {holders}" if obstacles.rows else holders,
                hint="Run the same command again when that transaction is over.",
            )
        idle += 1
        if changed or obstacles.rows >= left or idle == MOST_IDLE:
            return obstacles, left


def until_none_is_left(
    db: Database,
    table: Table,
    what: str,
    once: Callable[[Obstacles], tuple[int, int]],
    *,
    pending: str,
    otherwise: str,
    hint: str,
) -> None:
    """The same for what can leave no row behind: raises MigrationError, which says that so many rows (of values) are
    left `otherwise`, and names some that are `pending` (SQL)."""
    obstacles, left = passes(db, table.oid, what, once)
    if not left:
        return

    def names(most: int) -> list[str]:
        with db.transaction():
            return keys_where(db, table, pending, most=most)

    raise MigrationError(f"{left:,} {otherwise}", detail=in_the_way(obstacles, left, names), hint=hint)


def in_the_way(obstacles: Obstacles, left: int, names: Callable[[int], list[str]]) -> str:
    """For a DETAIL: by reason, how many rows can't be written, and which; `names` gives some of all that are left."""
    said = [obstacles.summary()] if obstacles.rows else []
    if (others := left - obstacles.rows) > 0:
        known = {name for refused in obstacles.refused.values() for name in refused}
        some = [name for name in names(SHOWN_KEYS + len(known)) if name not in known]
        said.append(
            f"{shown(some, others)} without their value after an UPDATE, which a trigger or rule of the table's keeps"
            " from them or changes; or they were written all the time"
        )
    return "; ".join(said) + "."
