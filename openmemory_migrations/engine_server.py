"""Converts inside the database, by the SQL function that the trigger has: only keys travel.

Slower than the client where the server's processors are the limit, faster where the network is. The only way on a
distributed table, where each node converts its own rows. The statements are the same on Citus and on a plain server:
pages by the primary key, no lock clause, no join, every setting as a statement of its own.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import DBAPIError

from . import locks, synctrigger
from .beside import side_by_side
from .catalog import Extension, Table
from .claims import Claims, space_of
from .database import APPLICATION_NAME, Database
from .errors import MigrationError
from .pace import Pace
from .passes import UNCHANGED, Steps
from .progress import Progress
from .reading import BATCH_BYTES
from .settings import Settings
from .target import Target, quote

# by the primary key whatever the planner believes about the table's size, and keys as text that is read back as it was
PLAN = """
SELECT set_config('row_security', 'off', true), set_config('client_min_messages', 'error', true),
       set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true),
       set_config('extra_float_digits', '1', true), set_config('datestyle', 'ISO', true),
       set_config('intervalstyle', 'postgres', true),
       set_config('application_name', :name, true)
"""
PENDING = "{vector} IS NULL AND octet_length({source}) = {octets}"
# qualified: a plain name in ORDER BY would be the text that is returned
KEY_OF = "SELECT {key_text} FROM {table} AS t WHERE " + PENDING + "{from} ORDER BY {key_order} LIMIT 1 OFFSET {skipped}"
# the value is computed from the version of the row that is updated: nothing can come between reading and writing it
CONVERT = "UPDATE {table} SET {vector} = {convert}({source}, {dimensions}) WHERE " + PENDING + "{from}{until}"
CONVERTIBLE = " AND {convert}({source}, {dimensions}) IS NOT NULL"
RETURNING = " RETURNING {vector} IS NULL"
LEFT = "SELECT {key_text} FROM {table} AS t WHERE " + PENDING + CONVERTIBLE + "{from}{until}"
LAST_PAGE = 0  # claimed by this number; the others by their last key's

Key = tuple[str, ...]  # the primary key's values as text


class ServerEngine:
    """Raises MigrationError where there is no primary key to take pages by."""

    def __init__(self, db: Database, target: Target, settings: Settings, table: Table, extension: Extension) -> None:
        require_key(target, table)
        self.db, self.settings, self.table = db, settings, table
        self.space = space_of(target.schema, target.table, target.vector)
        with db.transaction(batch=True):
            self.lock_timeout = locks.batch_timeout(db, settings)
            self.statement_timeout = str(db.value("SELECT current_setting('statement_timeout')"))
        synctrigger.ensure_convert(db, **extension.names())

    def walk(self, dimensions: int, workers: list[Claims], progress: Progress, pace: Pace) -> None:
        def convert(db: Database, claims: Claims) -> None:
            _Worker(self, db, dimensions, claims, progress, pace.on(db)).take()

        side_by_side(self.db, [partial(convert, claims=claims) for claims in workers])


def require_key(target: Target, table: Table) -> None:
    if not table.key:
        raise MigrationError(
            f"table {target} has no primary key, which OM_BACKFILL_ENGINE=server takes its batches by",
            hint="Set OM_BACKFILL_ENGINE=client, or add a primary key.",
        )


@dataclass
class _Worker:
    """Goes through the table by its primary key, a transaction a page."""

    engine: ServerEngine
    db: Database
    dimensions: int
    claims: Claims
    progress: Progress
    pace: Pace
    steps: Steps = field(init=False)

    def __post_init__(self) -> None:
        most = min(self.engine.settings.backfill_batch, BATCH_BYTES // (4 * self.dimensions))
        self.steps = Steps(self.db, self.progress.what, most)

    def take(self) -> None:
        after: Key | None = None
        over = False
        while not over:
            try:
                until = self._page(after)
            except DBAPIError as error:
                outcome = self.steps.failed(error, self.steps.size)
                if outcome == "again":
                    continue
                if until := self._passed_by(after):
                    self.progress.obstacles.pass_by(outcome, error, [self._name(until)])
            else:
                self.steps.done()
            after, over = until, until is None

    def _passed_by(self, after: Key | None) -> Key | None:
        """The one row that a page of one would have."""
        with self.db.transaction():
            self.db.run(PLAN, {"name": f"{APPLICATION_NAME} {self.progress.activity}"})
            return self._key(">", after, 0)

    def _page(self, after: Key | None) -> Key | None:
        """Converts the page behind `after` unless somebody else is at it; returns its last key, None at the end."""
        done = bad = 0
        kept: list[Key] = []
        with self.db.transaction():
            locks.set_timeout(self.db, self.engine.lock_timeout)
            self.db.run(PLAN, {"name": f"{APPLICATION_NAME} {self.progress.activity}"})
            first = self._key(">", after, 0)
            if first is None:
                return None
            until = self._key(">=", first, self.steps.size - 1)
            # a page may be far behind the one before it; only what is converted heeds a statement_timeout of the role's
            ours = self.claims.take(self.db, self.engine.space, [_number(until)])
            if ours:
                self.db.set_local({"statement_timeout": self.engine.statement_timeout})
                self.steps.heed()
                self.db.run("SAVEPOINT openmemory_migrations")
                found = self._convert(first, until)
                if bad := sum(found):
                    # those are not to be touched: once more without them
                    self.db.run("ROLLBACK TO SAVEPOINT openmemory_migrations")
                    found = self._convert(first, until, CONVERTIBLE)
                    bad -= sum(found)
                done = found.count(False)
                if done + bad < self.steps.size:
                    kept = self._kept(first, until)
        if kept:
            self.progress.obstacles.refuse_for(UNCHANGED, [self._name(key) for key in kept])
        if ours:
            self.progress.add(self.db, done, bad)
            self.pace.rest(self.progress.what)
        return until

    def _key(self, side: str, bound: Key | None, skipped: int) -> Key | None:
        """The pending row's that comes so many rows behind `bound`."""
        row = self._run(KEY_OF, {"from": (side, bound)}, skipped=str(skipped)).one_or_none()
        return None if row is None else tuple(row)

    def _convert(self, first: Key, until: Key | None, more: str = "") -> list[bool]:
        """For each row that was updated, whether it has no vector even so."""
        bounds = {"from": (">=", first), "until": ("<=", until)}
        return [row[0] for row in self._run(CONVERT + more + RETURNING, bounds)]

    def _kept(self, first: Key, until: Key | None) -> list[Key]:
        """Those that an UPDATE leaves as they are: there before it and after, so nobody has written them meanwhile."""
        bounds = {"from": (">=", first), "until": ("<=", until)}
        before = {tuple(row) for row in self._run(LEFT, bounds)}
        if not before:
            return []
        self._convert(first, until, CONVERTIBLE)
        return sorted(before & {tuple(row) for row in self._run(LEFT, bounds)})

    def _name(self, key: Key) -> str:
        return "(" + ", ".join(f"{name}={value}" for name, value in zip(self.engine.table.key, key, strict=True)) + ")"

    def _run(self, template: str, bounds: dict[str, tuple[str, Key | None]], **names: str) -> CursorResult[Any]:
        key = self.engine.table.key
        types = {f"type{i}": self.engine.table.columns[name].type for i, name in enumerate(key)}
        values: dict[str, str] = {}
        for name, (operator, bound) in bounds.items():
            condition = ""
            if bound is not None:
                given = ", ".join(f"CAST(:{name}{i} AS {{type{i}}})" for i in range(len(key)))
                condition = f" AND ({{key}}) {operator} ({given})"
                values |= {f"{name}{i}": value for i, value in enumerate(bound)}
            template = template.replace(f"{{{name}}}", condition)
        return self.db.run(
            template,
            values,
            key=", ".join(map(quote, key)),
            key_order=", ".join(f"t.{quote(name)}" for name in key),
            key_text=", ".join(f"CAST(t.{quote(name)} AS text)" for name in key),
            octets=str(4 * self.dimensions),
            dimensions=str(self.dimensions),
            **types,
            **names,
        )


def _number(until: Key | None) -> int:
    """What a page is claimed by: runs that come to the same place find the same last key."""
    return zlib.crc32("\0".join(until).encode()) - 2**31 if until else LAST_PAGE
