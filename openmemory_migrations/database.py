"""URL, TLS, and the one place that knows the driver: COPY, server notices, commit, autocommit.

Statements go through SQLAlchemy's `text()`, commits through the driver's own connection: that ends the server's
transaction under any env.py, while SQLAlchemy's and Alembic's transaction objects stay as they are.
"""

from __future__ import annotations

import io
import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from . import log
from .errors import ConnectionLost, MigrationError
from .settings import Settings
from .signals import Stop, listening

APPLICATION_NAME = "openmemory-migrations"
DRIVERS = ("psycopg2",)
NO_VERIFICATION = "/nonexistent/openmemory-migrations"
# Debian, Red Hat, Alpine and macOS
AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
COPY_BUFFER = 64 * 1024

LOCK_NOT_AVAILABLE, DEADLOCK, CANCELED, SERIALIZATION_FAILURE = "55P03", "40P01", "57014", "40001"


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
    if url.get_driver_name() not in DRIVERS:
        raise MigrationError(
            f'driver "{url.get_driver_name()}" is not supported',
            hint="Use postgresql:// or postgresql+psycopg2:// in OM_DATABASE_URL.",
        )
    # a lock's connection is idle for hours, and what stands between forgets idle connections within minutes
    arguments = {"application_name": APPLICATION_NAME, "keepalives_idle": "60"}
    own = {name: value for name, value in arguments.items() if name not in url.query}
    return sa.create_engine(url, poolclass=NullPool, connect_args=own)


@contextmanager
def second_connection(engine: Engine) -> Iterator[Connection]:
    """A connection beside the one at work, from a pool of the same make: the engine's own may hold one only."""
    with Engine(engine.pool.recreate(), engine.dialect, engine.url).connect() as connection:
        yield connection


def sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "pgcode", None)


def as_migration_error(error: DBAPIError, doing: str) -> MigrationError:
    """The server's or the driver's own words as our error, without the statement and its parameters."""
    diagnostics = getattr(error.orig, "diag", None)
    message = getattr(diagnostics, "message_primary", None) or " ".join(str(error.orig).split())
    if error.connection_invalidated:
        return ConnectionLost(
            f"{doing}: the connection was lost: {message}",
            hint="Run the same command again to continue; what is committed is kept.",
        )
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
        self.stop = Stop()

    @property
    def _driver(self) -> Any:
        return self.connection.connection.dbapi_connection

    @property
    def usable(self) -> bool:
        """Whether the connection is still there."""
        return not self.connection.invalidated and not self._driver.closed

    @property
    def pooled(self) -> bool:
        """Whether a pooler such as PgBouncer stands between: it tells clients of another process than the server's."""
        return bool(self._driver.get_backend_pid() != self.value("SELECT pg_backend_pid()"))

    # -- statements

    def sql(self, template: str, **more: str) -> str:
        return template.format_map({**self.names, **more})

    def run(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: str) -> CursorResult[Any]:
        # a colon inside a quoted name is not a parameter
        escaped = {name: value.replace(":", r"\:") for name, value in {**self.names, **names}.items()}
        with self._heeding_signals():
            return self.connection.execute(sa.text(template.format_map(escaped)), parameters or {})

    def rows(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: str) -> Sequence[Any]:
        return self.run(template, parameters, **names).all()

    def value(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: str) -> Any:
        return self.run(template, parameters, **names).scalar()

    def copy_out(self, template: str, /, **names: str) -> memoryview:
        """What COPY (`template`) TO STDOUT (FORMAT binary) gives, whole."""
        received = io.BytesIO()
        self._copy(f"COPY ({self.sql(template, **names)}) TO STDOUT (FORMAT binary)", received)
        return received.getbuffer()

    def copy_in(self, template: str, data: bytes, /, **names: str) -> None:
        """COPY `template` (a table) FROM STDIN (FORMAT binary)."""
        self._copy(f"COPY {self.sql(template, **names)} FROM STDIN (FORMAT binary)", io.BytesIO(data))

    def _copy(self, statement: str, stream: io.BytesIO) -> None:
        with self._heeding_signals(), self._wrapping_errors("COPY"), self._driver.cursor() as cursor:
            cursor.copy_expert(statement, stream, COPY_BUFFER)

    @contextmanager
    def _wrapping_errors(self, statement: str) -> Iterator[None]:
        """Makes of the driver's errors what SQLAlchemy makes of them."""
        driver = self._driver
        try:
            yield
        except self.connection.dialect.loaded_dbapi.Error as error:
            raise DBAPIError(statement, None, error, connection_invalidated=driver.closed != 0) from error

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if sqlstate(error) == CANCELED:
                self.stop.check()
            raise

    # -- transactions

    def commit(self) -> None:
        with self._wrapping_errors("COMMIT"):
            self._driver.commit()

    def rollback(self) -> None:
        if self.usable:
            with self._wrapping_errors("ROLLBACK"):
                self._driver.rollback()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Looks at rows inside the transaction that is open already, and leaves its settings as they were."""
        with self.local("row_security", "off"), self.local("statement_timeout", "0"):
            yield

    @contextmanager
    def local(self, name: str, value: str) -> Iterator[None]:
        """Sets `name` inside the transaction and puts it back; after an error the rollback does that."""
        before = self.value("SELECT current_setting(:name)", {"name": name})
        self.set_local(name, value)
        yield
        self.set_local(name, before)

    def set_local(self, name: str, value: str) -> None:
        self.run("SELECT set_config(:name, :value, true)", {"name": name, "value": value})

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits at the end, rolls back on any exception; what was open before must have been committed."""
        self.stop.check()
        try:
            # an error instead of a partial result where a policy would hide rows from this role
            self.run("SET LOCAL row_security = off")
            yield
            self.commit()
        except BaseException:
            self.rollback()
            raise

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
        """Makes the connection fit for our work while it lasts: notices logged, signals heeded, no autocommit."""
        dialect, driver = self.connection.dialect, self._driver
        autocommit, notices = driver.autocommit, driver.notices
        driver.notices = _Notices()
        if autocommit:
            dialect.set_isolation_level(driver, "READ COMMITTED")

        def cancel() -> None:
            with suppress(Exception):  # the connection may be gone already
                driver.cancel()

        try:
            with listening(self.stop, cancel):
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
