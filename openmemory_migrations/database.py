"""URL, TLS, and the one place that knows the driver: COPY, server notices, commit, autocommit.

Statements go through SQLAlchemy's `text()`, commits through the driver's own connection: that ends the server's
transaction under any env.py, while SQLAlchemy's and Alembic's transaction objects stay as they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from . import log
from .errors import MigrationError
from .settings import Settings

APPLICATION_NAME = "openmemory-migrations"
DRIVERS = ("psycopg2",)
NO_VERIFICATION = "/nonexistent/openmemory-migrations"
COPY_BUFFER = 64 * 1024

LOCK_NOT_AVAILABLE, DEADLOCK, CANCELED = "55P03", "40P01", "57014"
INSUFFICIENT_PRIVILEGE = "42501"


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
        # node uses the system's authorities when OpenMemory names none; libpq has a word for it since 16
        tls["sslrootcert"] = settings.pg_ssl_ca or "system"
    return URL.create(
        "postgresql+psycopg2",
        username=settings.pg_user,
        password=settings.pg_password,
        host=settings.pg_host,
        port=settings.pg_port,
        database=settings.pg_db,
        query=tls,
    )


def engine_for(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        return sa.create_engine(url, poolclass=NullPool)
    if url.get_driver_name() not in DRIVERS:
        raise MigrationError(
            f'driver "{url.get_driver_name()}" is not supported',
            hint="Use postgresql:// or postgresql+psycopg2:// in OM_DATABASE_URL.",
        )
    arguments = {} if "application_name" in url.query else {"application_name": APPLICATION_NAME}
    return sa.create_engine(url, poolclass=NullPool, connect_args=arguments)


def sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "pgcode", None)


def as_migration_error(error: DBAPIError, doing: str) -> MigrationError:
    """The server's or the driver's own words as our error, without the statement and its parameters."""
    diagnostics = getattr(error.orig, "diag", None)
    message = getattr(diagnostics, "message_primary", None) or str(error.orig).strip().replace("\n", " ")
    state = sqlstate(error)
    return MigrationError(
        f"{doing}: {message}" + (f" (SQLSTATE {state})" if state else ""),
        detail=getattr(diagnostics, "message_detail", None),
        hint=getattr(diagnostics, "message_hint", None),
    )


class _Notices:
    """Stands in for psycopg2's list of notices: SQLAlchemy empties the list after each statement, unread."""

    def append(self, text: str) -> None:
        log.server_message(text)


class Database:
    """A connection that somebody else opened, with our own transactions on it.

    SQL texts name our objects as `{table}`, `{vector}` …; `names` holds those, quoted. Values are `:parameters`.
    """

    def __init__(self, connection: Connection, names: Mapping[str, str]) -> None:
        self.connection = connection
        self.names = dict(names)

    @property
    def _driver(self) -> Any:
        return self.connection.connection.dbapi_connection

    @property
    def usable(self) -> bool:
        return not self._driver.closed

    # -- statements

    def sql(self, template: str, **more: str) -> str:
        return template.format_map({**self.names, **more})

    def run(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: str) -> CursorResult[Any]:
        # a colon inside a quoted name is not a parameter
        escaped = {name: value.replace(":", r"\:") for name, value in {**self.names, **names}.items()}
        return self.connection.execute(sa.text(template.format_map(escaped)), parameters or {})

    def rows(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: str) -> Sequence[Any]:
        return self.run(template, parameters, **names).all()

    def value(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: str) -> Any:
        return self.run(template, parameters, **names).scalar()

    def copy_out(self, template: str, /, **names: str) -> memoryview:
        """What COPY (`template`) TO STDOUT (FORMAT binary) gives, whole."""
        received = io.BytesIO()
        with self._driver.cursor() as cursor:
            cursor.copy_expert(f"COPY ({self.sql(template, **names)}) TO STDOUT (FORMAT binary)", received, COPY_BUFFER)
        return received.getbuffer()

    def copy_in(self, template: str, data: bytes, /, **names: str) -> None:
        """COPY `template` (a table) FROM STDIN (FORMAT binary)."""
        with self._driver.cursor() as cursor:
            cursor.copy_expert(
                f"COPY {self.sql(template, **names)} FROM STDIN (FORMAT binary)",
                io.BytesIO(data),
                COPY_BUFFER,
            )

    # -- transactions

    def commit(self) -> None:
        self._driver.commit()

    def rollback(self) -> None:
        if self.usable:
            self._driver.rollback()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Looks at rows inside the transaction that is open already, and leaves its settings as they were."""
        before = self.value("SELECT current_setting('row_security')")
        self._see_all_rows()
        yield
        self.run("SELECT set_config('row_security', :before, true)", {"before": before})

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits at the end, rolls back on any exception; what was open before must have been committed."""
        try:
            self._see_all_rows()
            yield
            self.commit()
        except BaseException:
            self.rollback()
            raise

    def _see_all_rows(self) -> None:
        # an error instead of a partial result where a policy would hide rows from this role
        self.run("SET LOCAL row_security = off")

    @contextmanager
    def autocommit(self) -> Iterator[None]:
        """For statements that refuse a transaction; puts the isolation level back as it was."""
        dialect, driver = self.connection.dialect, self._driver
        self.commit()
        before = None if driver.autocommit else dialect.get_isolation_level(driver)
        self.commit()
        if before:
            dialect.set_isolation_level(driver, "AUTOCOMMIT")
        try:
            yield
        finally:
            if before and self.usable:
                dialect.set_isolation_level(driver, before)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Makes the connection fit for transactions of ours while it lasts: notices logged, no autocommit."""
        dialect, driver = self.connection.dialect, self._driver
        autocommit, notices = driver.autocommit, driver.notices
        driver.notices = _Notices()
        if autocommit:
            dialect.set_isolation_level(driver, "READ COMMITTED")
        try:
            yield
        finally:
            if self.usable:
                driver.notices = notices
                if autocommit:
                    driver.rollback()
                    dialect.set_isolation_level(driver, "AUTOCOMMIT")


def refuse_foreign_transaction(connection: Connection) -> None:
    """Raises MigrationError inside a SAVEPOINT or a two-phase transaction: there no batch can be committed."""
    if connection.in_nested_transaction():
        what = "a SAVEPOINT (begin_nested)"
    elif isinstance(connection.get_transaction(), sa.TwoPhaseTransaction):
        what = "a two-phase transaction (begin_twophase)"
    else:
        return
    raise MigrationError(
        f"the migration runs inside {what}, where no batch can be committed",
        hint="Give context.configure() in env.py a connection without it, such as connectable.connect().",
    )
