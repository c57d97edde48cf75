"""What each driver does in its own way: a file a driver.

One small class over the raw connection that SQLAlchemy holds (connection.connection.dbapi_connection). The async
drivers are called from SQLAlchemy's greenlet, and `run_async`, which is public there, takes their coroutines.
"""

from __future__ import annotations

from sqlalchemy.engine import Connection

from ...errors import MigrationError
from . import asyncpg, psycopg, psycopg2
from .driver import Driver

# SQLAlchemy's name for it, and whether it is async
DRIVERS: dict[tuple[str, bool], type[Driver]] = {**psycopg2.DRIVERS, **psycopg.DRIVERS, **asyncpg.DRIVERS}


def refused(driver: str, is_async: bool, *, sync_only: bool = False) -> MigrationError | None:
    """What is said of a driver, by SQLAlchemy's name, that isn't supported; `sync_only` where no other can be used."""
    if (driver, is_async) in DRIVERS:
        return None
    names = ", ".join(dict.fromkeys(name for name, of_async in DRIVERS if not (sync_only and of_async)))
    return MigrationError(
        f'driver "{driver}" is not supported',
        hint=f"Use one of {names}, as in postgresql+psycopg2://user:password@host/database.",
    )


def driver_of(connection: Connection) -> Driver:
    """The driver of an open connection. Raises MigrationError for one that isn't supported, by name."""
    dialect = connection.dialect
    if error := refused(dialect.driver, dialect.is_async):
        raise error
    return DRIVERS[dialect.driver, dialect.is_async](connection.connection.dbapi_connection)
