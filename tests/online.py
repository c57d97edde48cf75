"""What the tests of a migration beside other work share: how far it is, who is connected, the package's connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from demo.openmemory import TABLE
from openmemory_migrations import backfill, catalog
from openmemory_migrations.connecting import engine_for, url_of
from openmemory_migrations.database import APPLICATION_NAME
from openmemory_migrations.database import Database as PackageDatabase
from openmemory_migrations.settings import Settings
from openmemory_migrations.target import Target

from .helpers import Database

TARGET = Target("public", TABLE)
D = TypeVar("D", bound=PackageDatabase)


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


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.01)


@contextmanager
def package(database: Database, make: Callable[..., D] = PackageDatabase) -> Iterator[D]:  # type: ignore[assignment]
    """The package's own connection, ready for `with db.transaction()`."""
    url = url_of(Settings.load({"database_url": database.url}, {}))
    assert url is not None
    engine = engine_for(url)
    try:
        with engine.connect() as connection:
            db = make(connection, TARGET.names())
            with db.session():
                yield db
    finally:
        engine.dispose()


def all_at_once(works: Sequence[Callable[[], object]]) -> None:
    """Run each in a thread of its own, wait for all, and raise what the first of them has raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


def run_backfill(database: Database, make: Callable[..., D], **settings: object) -> D:
    """The package's own backfill, in this process, on a connection that watches it or interferes."""
    with package(database, make) as db:
        with db.transaction():
            table, extension = catalog.table(db, "public", TABLE), catalog.extension(db)
        assert table
        assert extension
        backfill.run(db, TARGET, Settings.load(settings, {}), table, extension)
    return db
