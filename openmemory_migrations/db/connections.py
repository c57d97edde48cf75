"""The configured database, and beginning again when its connections are lost."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.pool import NullPool

from .. import log
from ..errors import ConnectionLost, MigrationError
from ..settings import Settings
from .database import APPLICATION_NAME
from .drivers import DRIVERS, refused
from .signals import Interrupted
from .sqlerrors import as_migration_error, lost

NO_VERIFICATION = "/nonexistent/openmemory-migrations"
# Debian, Red Hat, Alpine and macOS
AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
RECONNECT_PAUSES = (1, 2, 4, 8, 15, 30)  # seconds: a server that restarts is back within a minute
STANDBY = (
    "This server is a standby, which ends what is in the way of its primary's changes: ask the primary, or have the"
    " standby wait (max_standby_streaming_delay, hot_standby_feedback)."
)

T = TypeVar("T")


def url_of(settings: Settings) -> URL | None:
    """The configured database, or None. Never a guess: no default host."""
    if settings.database_url is not None:
        return settings.database_url
    if settings.pg_host is None:
        return None
    tls = {"sslmode": settings.pg_ssl}
    if settings.pg_ssl == "require":
        # libpq verifies under `require` too as soon as ~/.postgresql/root.crt exists; OpenMemory's `require` doesn't
        tls["sslrootcert"] = NO_VERIFICATION
    elif settings.pg_ssl == "verify-full":
        tls["sslrootcert"] = settings.pg_ssl_ca or _system_authorities()
    return URL.create(
        "postgresql+psycopg2",
        username=settings.pg_user,
        password=settings.pg_password,
        host=settings.pg_host,
        port=settings.pg_port,
        database=settings.pg_db,
        query=tls,
    )


def _system_authorities() -> str:
    """The file of authorities that this machine trusts, where OpenMemory names none.

    libpq's own word for it, `system`, finds none in psycopg2-binary: its OpenSSL looks in a folder that nobody has.
    """
    found = (ssl.get_default_verify_paths().cafile, *AUTHORITIES)
    return next((path for path in found if path and os.path.isfile(path)), "system")


def engine_for(url: URL) -> Engine:
    if url.get_driver_name() == "pysqlite":
        return sa.create_engine(url, poolclass=NullPool)
    if problem := refused(url.get_driver_name(), False, sync_only=True):
        raise problem
    arguments = {"application_name": APPLICATION_NAME, **DRIVERS[url.get_driver_name(), False].arguments}
    own = {name: value for name, value in arguments.items() if name not in url.query}
    try:
        # whether there is hstore the drivers ask by operators, which may be others'
        return sa.create_engine(url, poolclass=NullPool, connect_args=own, use_native_hstore=False)
    except ModuleNotFoundError as error:
        raise MigrationError(
            f'driver "{url.get_driver_name()}" is not installed', hint=f'pip install "{error.name}"'
        ) from error


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


@contextmanager
def engine_of(url: URL) -> Iterator[Engine]:
    """The engine as long as a command works with it; what goes wrong leaves as an error of ours."""
    engine = engine_for(url)
    try:
        yield engine
    except (DBAPIError, PendingRollbackError) as error:
        raise _as_ours(error) from error
    except KeyboardInterrupt:
        raise Interrupted("SIGINT") from None
    finally:
        engine.dispose()


def _as_ours(error: MigrationError | DBAPIError | PendingRollbackError) -> MigrationError:
    if isinstance(error, PendingRollbackError):  # what Alembic gets for its next statement
        return lost("database", "it is closed")
    return as_migration_error(error, "database") if isinstance(error, DBAPIError) else error


def reconnecting(engine: Engine, work: Callable[[], T]) -> T:
    """Does the work again, on new connections, when the server or the network took them away; all of it continues."""
    reached = False
    pauses = iter(RECONNECT_PAUSES)
    while True:
        try:
            return work()
        except (ConnectionLost, DBAPIError, PendingRollbackError) as error:
            problem = _as_ours(error)
            # a database that was never reached is not lost; one that is on its way up refuses for a while
            reached = reached or isinstance(problem, ConnectionLost)
            pause = next(pauses, None)
            standby = reached and _is_standby(engine)
            if standby:
                problem = ConnectionLost(problem.message, detail=problem.detail, hint=STANDBY)
            if not reached or pause is None:
                raise problem from error
        again = f"Connecting again in {pause} s; what is committed is kept."
        log.warning(problem.message, hint=f"{again} {STANDBY}" if standby else again)
        time.sleep(pause)


def _is_standby(engine: Engine) -> bool:
    try:
        with engine.connect() as connection:
            return bool(connection.scalar(sa.text("SELECT pg_catalog.pg_is_in_recovery()")))
    except DBAPIError:
        return False
