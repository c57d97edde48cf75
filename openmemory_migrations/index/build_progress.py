"""How far the build of an index is, and whom it waits for, seen from a connection and a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from .. import console, log
from ..console import Shown
from ..db import citus
from ..db.database import WHATEVER, Database, in_thread, second_connection
from ..errors import MigrationError
from ..sql import blocks

BLOCKS = blocks("index")

LOG_INTERVAL = 5.0  # seconds between two lines
LOOK_INTERVAL = 0.5  # seconds between two looks for the bar of a terminal


@dataclass(frozen=True)
class Phase:
    """A build has several, each from 0 % on, and some without any; `locker` is the process that it waits for."""

    name: str
    percent: int | None = None
    locker: int | None = None

    @property
    def note(self) -> str:
        return self.name.removeprefix("building index: ") + self._waiting

    @property
    def _waiting(self) -> str:
        return f", waiting for process {self.locker}" if self.locker else ""

    def __str__(self) -> str:
        return self.name + (f", {self.percent} %" if self.percent is not None else "") + self._waiting


@contextmanager
def shown(db: Database, table_oid: int, what: str) -> Iterator[None]:
    """Says whom the build has to wait for, and while it lasts how far it is."""
    over = threading.Event()
    engine = db.connection.engine

    def watch(bar: Shown | None) -> None:
        try:
            with second_connection(engine) as connection:
                while not over.wait(LOOK_INTERVAL if bar else LOG_INTERVAL):
                    Database(connection, {}).set_local(WHATEVER)
                    if found := _at_nodes(connection) or phase(connection, [table_oid]):
                        if bar:
                            bar.to(found.percent or 0, found.note)
                        else:
                            log.notice(f"{what}: {found}")
                    connection.rollback()
        except (MigrationError, SQLAlchemyError) as error:
            # the build goes on without its lines
            log.notice(f"{what}: progress can't be shown ({type(error).__name__})")

    with db.transaction():
        waits = _waits(db, table_oid)
    if waits:
        log.notice(f"{what}: has to wait until transactions that are open now are over", detail=waits)
    with console.bar(what, 100, "%") as bar:
        thread = threading.Thread(
            target=in_thread,
            args=(engine, lambda: watch(bar)),
            name="openmemory-migrations progress",
            daemon=True,
        )
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _waits(db: Database, table_oid: int) -> str | None:
    """The transactions with a snapshot or a write that the build will have to outlive, oldest first."""
    found = [waits for (waits,) in db.rows(BLOCKS.waits, {"table": table_oid})]
    return "; ".join(found) + "." if found else None


def _at_nodes(connection: Connection) -> Phase | None:
    text = citus.build_progress(connection)
    return Phase(text) if text else None


def phase(connection: Connection, tables: list[int]) -> Phase | None:
    """Where the build of an index on one of these tables is, or None where none is being built."""
    row = connection.execute(
        sa.text(BLOCKS.phase),
        {"tables": tables},
    ).first()
    if row is None:
        return None
    name, *counts, locker = row
    shares = [100 * done // total for done, total in zip(counts[::2], counts[1::2], strict=True) if total]
    return Phase(str(name), shares[0] if shares else None, locker or None)
