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


def driver_of(connection: Connection) -> Driver:
    """The driver of an open connection. Raises MigrationError for one that isn't supported, by name."""
    dialect = connection.dialect
    found = DRIVERS.get((dialect.driver, dialect.is_async))
    if found is None:
        names = ", ".join(dict.fromkeys(name for name, _ in DRIVERS))
        raise MigrationError(
            f'driver "{dialect.driver}" is not supported',
            hint=f"Use one of {names}, as in postgresql+psycopg2://user:password@host/database.",
        )
    return found(connection.connection.dbapi_connection)
