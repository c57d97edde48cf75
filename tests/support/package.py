"""The package on a connection of its own, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from demo.openmemory import TABLE
from openmemory_migrations.db import catalog
from openmemory_migrations.db.connections import engine_for, url_of
from openmemory_migrations.db.context import Context
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.settings import Settings
from openmemory_migrations.steps import backfill
from openmemory_migrations.target import Target
from tests.support.engines import CHOSEN
from tests.support.openmemory import Database

TARGET = Target("public", TABLE)


D = TypeVar("D", bound=PackageDatabase)


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


def run_backfill(database: Database, make: Callable[..., D], **settings: object) -> D:
    """The package's own backfill, in this process, on a connection that watches it or interferes."""
    with package(database, make) as db:
        with db.transaction():
            table, extension = catalog.table(db, "public", TABLE), catalog.extension(db)
        assert table
        assert extension
        backfill.run(Context(db, TARGET, Settings.load(settings, CHOSEN)).with_table(table).with_extension(extension))
    return db
