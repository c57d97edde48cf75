"""The configured database, and beginning again when its connections are lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from . import log
from .database import as_migration_error, url_of
from .errors import ConnectionLost, MigrationError
from .settings import Settings

RECONNECT_PAUSES = (1, 2, 4, 8, 15, 30)  # seconds: a server that restarts is back within a minute

T = TypeVar("T")


def required_url(settings: Settings) -> URL | None:
    """The configured database, or None where OM_METADATA_BACKEND says that there is none. Raises MigrationError."""
    if settings.database_url is None and settings.metadata_backend == "sqlite":
        log.notice("OM_METADATA_BACKEND is sqlite: there is no Postgres to migrate, nothing to do")
        return None
    url = url_of(settings)
    if url is None:
        raise MigrationError(
            "no database is configured",
            hint="Set OM_DATABASE_URL=postgresql://user:password@host/database, or OM_PG_HOST with OM_PG_PORT,"
            " OM_PG_DB, OM_PG_USER and OM_PG_PASSWORD as OpenMemory has them.",
        )
    return url


def reconnecting(work: Callable[[], T]) -> T:
    """Does the work again, on new connections, when the server or the network took them away; all of it continues."""
    lost = False
    for pause in RECONNECT_PAUSES:
        try:
            return work()
        except (ConnectionLost, DBAPIError) as error:
            problem = error if isinstance(error, ConnectionLost) else as_migration_error(error, "database")
            # a database that was never reached is not lost; one that is on its way up refuses for a while
            lost = lost or isinstance(problem, ConnectionLost)
            if not lost:
                raise problem from error
        log.warning(problem.message, hint=f"Connecting again in {pause} s; what is committed is kept.")
        time.sleep(pause)
    return work()
