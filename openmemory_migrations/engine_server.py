"""Converts inside the database, by the SQL function that the trigger has: only keys travel.

Slower than the client where the server's processors are the limit, faster where the network is. The only way on a
distributed table, where each node converts its own rows. The statements are the same on Citus and on a plain server:
pages by the primary key, no lock clause, no join, every setting as a statement of its own.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import DBAPIError

from . import locks, synctrigger
from .beside import side_by_side
from .catalog import Extension, Table
from .claims import Claims, space_of
from .database import Database
from .errors import MigrationError
from .pace import Pace
from .progress import Progress
from .reading import BATCH_BYTES
from .settings import Settings
from .sqlerrors import as_migration_error, sqlstate
from .target import Target, quote

# by the primary key whatever the planner believes about the table's size; what the batch does is the same without
PLAN = """
SELECT set_config('row_security', 'off', true),
       set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('application_name', :name, true)
"""
PENDING = "{vector} IS NULL AND octet_length({source}) = {octets}"
LAST_OF_PAGE = "SELECT {key_text} FROM {table} WHERE " + PENDING + "{after} ORDER BY {key} LIMIT 1 OFFSET {skipped}"
# the value is computed from the version of the row that is updated: nothing can come between reading and writing it
CONVERT = "UPDATE {table} SET {vector} = {convert}({source}, {dimensions}) WHERE " + PENDING + "{after}{until}"
CONVERTIBLE = " AND {convert}({source}, {dimensions}) IS NOT NULL"
RETURNING = " RETURNING {vector} IS NULL"
LAST_PAGE = 0  # claimed by this number; the others by their last key's

Key = tuple[str, ...]  # the primary key's values as text


class ServerEngine:
    """Raises MigrationError where there is no primary key to take pages by."""

    def __init__(self, db: Database, target: Target, settings: Settings, table: Table, extension: Extension) -> None:
        if not table.key:
            raise MigrationError(
                f"table {target} has no primary key, which OM_BACKFILL_ENGINE=server takes its batches by",
                hint="Set OM_BACKFILL_ENGINE=client, or add a primary key.",
            )
        self.db, self.settings, self.table = db, settings, table
        self.space = space_of(target.schema, target.table, target.vector)
        with db.transaction():
            self.lock_timeout = locks.batch_timeout(db, settings)
        synctrigger.ensure_convert(db, **extension.names())

    def walk(self, dimensions: int, workers: list[Claims], progress: Progress, pace: Pace) -> None:
        def convert(db: Database, claims: Claims) -> None:
            _Worker(self, db, dimensions, claims, progress).take(pace.on(db))

        side_by_side(self.db, [partial(convert, claims=claims) for claims in workers])


@dataclass
class _Worker:
    """Goes through the table by its primary key, a transaction a page."""

    engine: ServerEngine
    db: Database
    dimensions: int
    claims: Claims
    progress: Progress
    rows: int = 0  # of a page, fewer while something is in the way

    def take(self, pace: Pace) -> None:
        self.most_rows = max(1, min(self.engine.settings.backfill_batch, BATCH_BYTES // (4 * self.dimensions)))
        self.rows = self.most_rows
        after: Key | None = None
        tries = locks.Tries(self.db.stop.sleep)
        over = False
        while not over:
            try:
                until = self._page(after)
            except DBAPIError as error:
                problem = as_migration_error(error, self.progress.what)
                if sqlstate(error) not in locks.PASSING:
                    raise problem from error
                self.rows = max(1, self.rows // 2)
                tries.rest(problem, self.rows)
                continue
            pace.rest(self.progress.what)
            after, over, tries = until, until is None, locks.Tries(self.db.stop.sleep)
            self.rows = min(2 * self.rows, self.most_rows)

    def _page(self, after: Key | None) -> Key | None:
        """Converts the page behind `after` unless somebody else is at it; returns its last key, None at the end."""
        done = bad = 0
        with self.db.transaction():
            locks.set_timeout(self.db, self.engine.lock_timeout)
            self.db.run(PLAN, {"name": self.progress.application_name})
            until = self._last_key(after)
            if self.claims.take(self.db, self.engine.space, [_number(until)]):
                self.db.run("SAVEPOINT openmemory_migrations")
                found = self._convert(after, until)
                if bad := sum(found):
                    # those are not to be touched: once more without them
                    self.db.run("ROLLBACK TO SAVEPOINT openmemory_migrations")
                    found = self._convert(after, until, CONVERTIBLE)
                done = len(found)
        self.progress.add(self.db, done, bad)
        return until

    def _last_key(self, after: Key | None) -> Key | None:
        row = self._run(LAST_OF_PAGE, {"after": after}, skipped=str(self.rows - 1)).one_or_none()
        return None if row is None else tuple(row)

    def _convert(self, after: Key | None, until: Key | None, more: str = "") -> list[bool]:
        """For each row that was updated, whether it has no vector even so."""
        return [row[0] for row in self._run(CONVERT + more + RETURNING, {"after": after, "until": until})]

    def _run(self, template: str, bounds: dict[str, Key | None], **names: str) -> CursorResult[Any]:
        key = self.engine.table.key
        types = {f"type{i}": self.engine.table.columns[name].type for i, name in enumerate(key)}
        conditions = {"after": "", "until": ""}
        values: dict[str, str] = {}
        for name, bound in bounds.items():
            if bound is not None:
                given = ", ".join(f"CAST(:{name}{i} AS {{type{i}}})" for i in range(len(key)))
                conditions[name] = f" AND ({{key}}) {'>' if name == 'after' else '<='} ({given})"
                values |= {f"{name}{i}": value for i, value in enumerate(bound)}
        return self.db.run(
            template.replace("{after}", conditions["after"]).replace("{until}", conditions["until"]),
            values,
            key=", ".join(map(quote, key)),
            key_text=", ".join(f"CAST({quote(name)} AS text)" for name in key),
            octets=str(4 * self.dimensions),
            dimensions=str(self.dimensions),
            **types,
            **names,
        )


def _number(until: Key | None) -> int:
    """What a page is claimed by: runs that come to the same place find the same last key."""
    return zlib.crc32("\0".join(until).encode()) - 2**31 if until else LAST_PAGE
