"""A command that is watched while it works, and what others do meanwhile."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from signal import Signals
from typing import IO

import psycopg2
import pytest
from psycopg2.extensions import connection as Connection
from sqlalchemy.engine import Engine

from demo.openmemory import TABLE
from openmemory_migrations.db.connections import engine_for
from openmemory_migrations.settings import Settings
from tests.support.commands import NOTHING, Process, alembic, start_alembic
from tests.support.openmemory import Database, Row, checksum, create_table, load
from tests.support.sessions import eventually
from tests.support.states import EXPAND

SIGNALS = [Signals.SIGINT, Signals.SIGTERM]


REACTION = 10.0  # seconds; what it must not be is the rest or the wait that the signal falls into


# the run's sessions by their names, without that of the test
OURS = "datname = current_database() AND application_name LIKE 'openmemory-migrations%%'"


class Run:
    """An alembic command at work, and its log so far."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.log = ""
        # Alembic writes its FAILED line to stdout
        self._readers = [threading.Thread(target=self._read, args=[pipe]) for pipe in (process.stdout, process.stderr)]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.log += line

    def says(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """Wait for it and return the match."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.log)):
            assert self.process.poll() is None, f"ended without saying {pattern}\n{self.log}"
            assert time.monotonic() < end, f"not said within {timeout} s: {pattern}\n{self.log}"
            time.sleep(0.02)
        return found

    def ends(self, timeout: float = 60) -> int:
        """Wait for the end and return the exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s\n{self.log}")
        for reader in self._readers:
            reader.join()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.ends()


@contextmanager
def running(
    database: Database, *args: str, env: Mapping[str, str] = NOTHING, patch: str | None = None
) -> Iterator[Run]:
    """Run the command in the background; `patch` is Python that changes a constant of the package's modules first."""
    with start_alembic(database, *args, env=env, patch=patch) as process:
        run = Run(process)
        try:
            yield run
        finally:
            run.kill()


@contextmanager
def transaction(database: Database, *statements: str, name: str = "nightly report") -> Iterator[Connection]:
    """Somebody else's session, with a transaction open until its `rollback()`."""
    connection = psycopg2.connect(database.url, application_name=name)
    try:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
        yield connection
    finally:
        connection.close()


def engine_of(database: Database, name: str) -> Engine:
    """Return what the package connects with, as an application of this name."""
    url = Settings.load({"database_url": f"{database.url}&application_name={name}"}, {}).database_url
    assert url
    return engine_for(url)


def filled(database: Database, rows: list[Row]) -> str:
    create_table(database)
    load(database, rows)
    return checksum(database)


def expanded(database: Database, rows: list[Row]) -> str:
    """Leave the backfill as the next step: a lock on a row keeps the one before it from its lock on the table."""
    v = filled(database, rows)
    alembic(database, "upgrade", EXPAND)
    return v


def lock_row(position: int) -> str:
    """SQL that locks the row at this place in physical order, the order of the backfill."""
    place = f"SELECT ctid FROM {TABLE} ORDER BY ctid OFFSET {position} LIMIT 1"
    return f"SELECT FROM {TABLE} WHERE ctid = ({place}) FOR UPDATE"


def waiting(database: Database) -> list[int]:
    """Processes of the run that wait for a lock."""
    rows = database.rows(f"SELECT pid FROM pg_stat_activity WHERE {OURS} AND wait_event_type = 'Lock'")
    return [pid for (pid,) in rows]


def nothing_left(database: Database) -> bool:
    return not database.rows(f"SELECT FROM pg_stat_activity WHERE {OURS}")


def slow_rows(database: Database, seconds: float) -> None:
    """Have each row take its time in an UPDATE of any column but v, so that a batch can be met in its middle."""
    database.run(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        f" 'BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END'"
    )
    database.run(f"CREATE TRIGGER slow BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION slow()")


def assert_stopped(run: Run, number: Signals, database: Database) -> None:
    sent = time.monotonic()
    run.process.send_signal(number)
    # a negative code is a process that died of the signal, and could say nothing
    assert run.ends(3 * REACTION) > 0, run.log
    assert time.monotonic() - sent < REACTION
    eventually(lambda: nothing_left(database), 2)
    assert f"FAILED: stopped by {number.name}; what is committed is kept" in run.log
    assert "HINT:  Run the same command again to continue." in run.log
    assert "Traceback" not in run.log


@contextmanager
def session(database: Database) -> Iterator[Connection]:
    """Somebody else's connection, whose transaction is rolled back unless it is committed."""
    with closing(database.connect()) as connection:
        connection.autocommit = False
        yield connection
        connection.rollback()
