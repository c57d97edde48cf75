"""What the server says while a migration runs: how far it is, who is connected, what was executed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from demo.openmemory import TABLE
from openmemory_migrations.db.database import APPLICATION_NAME
from tests.support.openmemory import Database

T = TypeVar("T")


def converted(database: Database) -> int:
    """Return how many rows have their vector; none before there is a column for it."""
    column = "SELECT count(*) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'v_vector'"
    return int(database.value(column, TABLE) and database.value(f"SELECT count(v_vector) FROM {TABLE}"))


def sessions(database: Database, what: str = "count(*)", extra: str = "") -> int:
    """Ask pg_stat_activity about the sessions that runs have in this database."""
    asked = database.value(
        f"SELECT {what} FROM pg_stat_activity WHERE datname = current_database()"
        f" AND pid <> pg_backend_pid() AND application_name LIKE '{APPLICATION_NAME}%' {extra}"
    )
    return int(asked)


def terminate(database: Database, extra: str = "") -> int:
    return sessions(database, "count(pg_terminate_backend(pid))", extra)


def eventually(condition: Callable[[], T], timeout: float = 60, every: float = 0.01) -> T:
    """Return what `condition` gives as soon as that is true."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {timeout:.0f} s"
        time.sleep(every)
    return found


def all_at_once(works: Sequence[Callable[[], object]]) -> None:
    """Run each in a thread of its own, wait for all, and raise what the first of them has raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


@contextmanager
def logged_statements(database: Database) -> Iterator[list[tuple[str, str]]]:
    """Give process and text of every statement that sessions of this database begin meanwhile; filled at the end."""
    found: list[tuple[str, str]] = []
    database.run(f"ALTER DATABASE {database.name} SET log_statement = 'all'")
    (log,) = database.rows("SELECT current_setting('data_directory') || '/server.log'")[0]
    with open(log, errors="replace") as lines:
        lines.seek(0, 2)
        yield found
        database.run(f"ALTER DATABASE {database.name} RESET log_statement")
        # an entry of several lines goes on after a tab
        entries = re.findall(r"\[(\d+)\] LOG:  statement: (.*(?:\n\t.*)*)", lines.read())
    found += [(pid, " ".join(text.split())) for pid, text in entries]
