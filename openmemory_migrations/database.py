"""URL and TLS, and a connection that somebody else opened, with our own transactions on it.

Statements go through SQLAlchemy's `text()`, commits through the driver's own connection: that ends the server's
transaction under any env.py, while SQLAlchemy's and Alembic's transaction objects stay as they are.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError

from . import log
from .drivers import driver_of
from .errors import Changed, MigrationError
from .signals import Stop, listening
from .sqlerrors import CANCELED, sqlstate
from .target import quote

APPLICATION_NAME = "openmemory-migrations"
READ_COMMITTED: Any = "READ COMMITTED"
LOOKS = 10  # at a tree that others attach tables to

Seen = tuple[Any, ...]  # the tables that were looked at: their files, places in the tree, columns and triggers

SEEN = """
WITH RECURSIVE tree (oid, link) AS (
  SELECT CAST(pg_catalog.to_regclass(:table) AS oid), CAST(NULL AS xid)
  UNION ALL
  SELECT i.inhrelid, i.xmin
  FROM tree JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending)
SELECT CAST(tree.oid AS bigint), CAST(tree.link AS text), CAST(pg_catalog.pg_relation_filenode(tree.oid) AS bigint),
       ARRAY(SELECT CAST(ROW(a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull) AS text)
             FROM pg_catalog.pg_attribute a WHERE a.attrelid = tree.oid AND a.attnum > 0 AND NOT a.attisdropped
             ORDER BY a.attnum),
       ARRAY(SELECT CAST(ROW(t.oid, t.xmin, p.oid, p.xmin) AS text)
             FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
             WHERE t.tgrelid = tree.oid AND NOT t.tgisinternal ORDER BY t.oid)
FROM tree
ORDER BY tree.link IS NULL DESC, tree.oid
"""
UNLOCKED = """
SELECT EXISTS (SELECT FROM unnest(CAST(:tables AS bigint[])) AS seen (oid)
               WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.relation = seen.oid AND l.granted
                                 AND l.locktype = 'relation' AND l.pid = pg_catalog.pg_backend_pid()))
"""


@contextmanager
def second_connection(engine: Engine) -> Iterator[Connection]:
    """A connection beside the one at work, from a pool of the same make: the engine's own may hold one only."""
    with Engine(engine.pool.recreate(), engine.dialect, engine.url).connect() as connection:
        yield connection


def in_thread(engine: Engine, work: Callable[[], None]) -> None:
    """Runs `work` in a thread that isn't the engine's: an async driver needs an event loop of its own there."""
    if engine.dialect.is_async:
        asyncio.run(sa.util.greenlet_spawn(work))
    else:
        work()


class Database:
    """Statements, transactions and COPY on one connection.

    SQL texts name our objects as `{table}`, `{vector}` …; `names` holds those, quoted. Values are `:parameters`.
    """

    def __init__(self, connection: Connection, names: Mapping[str, str]) -> None:
        self.connection = connection
        self.names = dict(names)
        self.stop = Stop()
        self.driver = driver_of(connection)
        self._errors: tuple[Any, ...] = (*self.driver.errors, connection.dialect.loaded_dbapi.Error)
        self._lent: dict[str, str] = {}  # settings that were local to the host's transaction
        self._isolation: Any = None  # to put back
        self._oids: dict[str, int] = {}  # of the tables that have been looked at, by their names

    @property
    def _raw(self) -> Any:
        return self.connection.connection.dbapi_connection

    @property
    def usable(self) -> bool:
        """Whether the connection is still there."""
        return not self.connection.invalidated and not self.driver.closed

    @cached_property
    def pooled(self) -> bool:
        """Whether a pooler such as PgBouncer stands between: it tells clients of another process than the server's."""
        return bool(self.driver.pid != self.value("SELECT pg_backend_pid()"))

    def at(self, names: Mapping[str, str]) -> Database:
        """The same connection, with other names in the `{…}` of SQL texts."""
        other = copy.copy(self)
        other.names = {**self.names, **names}
        return other

    @contextmanager
    def beside(self, stop: Stop) -> Iterator[Database]:
        """The same on a connection of its own, for another thread, which `stop` stops."""
        with second_connection(self.connection.engine) as connection:
            connection = connection.execution_options(isolation_level="READ COMMITTED")
            other = type(self)(connection, self.names)
            other.stop, other._lent = stop, self._lent
            with other.driver.notices(log.server_message):
                yield other

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

    def quietly(self, template: str, /, **names: str) -> None:
        """Without the server's NOTICE that there is nothing to drop; inside a transaction."""
        with self.local("client_min_messages", "warning"):
            self.run(template, **names)

    def copy_out(self, template: str, /, **names: str) -> bytes | memoryview:
        """What COPY (`template`) TO STDOUT (FORMAT binary) gives, whole. Never the first statement of a transaction."""
        with self._heeding_signals(), self._wrapping_errors("COPY"):
            return self.driver.copy_out(self.sql(template, **names))

    def copy_in(self, table: str, data: bytes) -> None:
        """COPY FROM STDIN (FORMAT binary) into a temporary table. Never the first statement of a transaction."""
        with self._heeding_signals(), self._wrapping_errors("COPY"):
            self.driver.copy_in(table, data)

    @contextmanager
    def _wrapping_errors(self, statement: str) -> Iterator[None]:
        """Makes of the driver's errors what SQLAlchemy makes of them."""
        try:
            yield
        except self._errors as error:
            # what the error says decides as well: after an immediate shutdown libpq thinks that all is well
            lost = self.driver.closed or self.connection.dialect.is_disconnect(error, self._raw, None)
            raise DBAPIError(statement, None, error, connection_invalidated=lost) from error

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if sqlstate(error) == CANCELED:
                self.stop.check()
            raise

    # -- transactions

    def take_over(self) -> None:
        """Ends the transaction that Alembic has open, by a commit, and makes READ COMMITTED of what follows.

        A role or search_path that was set for that transaction only (SET LOCAL in a host's env.py) is kept for ours.
        """
        dialect = self.connection.dialect
        local = self._role_and_path()
        self.commit()
        if self._isolation is None:
            self._isolation = dialect.get_isolation_level(self._raw)
            self.commit()
        # also where it is that already: behind a pooler the next transaction may be on a connection where it isn't
        dialect.set_isolation_level(self._raw, READ_COMMITTED)
        now = self._role_and_path()
        self._lent = {name: value for name, value in local.items() if now[name] != value}
        self.commit()

    def renew(self) -> None:
        """Takes over a transaction whose snapshot may be older than what has been waited for since it began."""
        if self.value("SELECT current_setting('transaction_isolation')") != "read committed":
            self.take_over()

    def _role_and_path(self) -> dict[str, str]:
        return {name: self.value("SELECT current_setting(:name)", {"name": name}) for name in ("role", "search_path")}

    def commit(self) -> None:
        with self._wrapping_errors("COMMIT"):
            self._raw.commit()

    def rollback(self) -> None:
        if self.usable:
            with self._wrapping_errors("ROLLBACK"):
                self._raw.rollback()

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
    def transaction(self, *, snapshot: bool = False, lock_timeout_ms: int = 0) -> Iterator[Seen]:
        """Commits at the end, rolls back on any exception; what was open before must have been committed.

        With `snapshot`: read-only, all statements see the same rows, and no statement_timeout of a role's ends them.
        Nobody can drop or rewrite the table meanwhile: the snapshot is taken under a lock on it, since a table that
        was rewritten is empty to an older one. `lock_timeout_ms` is how long that is waited for, 0 what the role has.
        Yields what was looked at, for whoever decides by it in a later transaction (`require_seen`).
        """
        self.stop.check()
        try:
            seen = self._take_snapshot(lock_timeout_ms) if snapshot else ()
            # an error instead of a partial result where a policy would hide rows from this role
            self.run("SET LOCAL row_security = off")
            self.borrow()
            yield seen
            self.commit()
        except BaseException:
            self.rollback()
            raise

    def _take_snapshot(self, lock_timeout_ms: int) -> Seen:
        """Locks the whole tree, then looks: a table that is attached while the lock is waited for isn't locked."""
        for _ in range(LOOKS):
            self.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            self.run("SET LOCAL statement_timeout = 0")
            # before anything that takes the snapshot, as the first SELECT does; by the role that may
            if role := self._lent.get("role"):
                self.run("SET LOCAL ROLE {role}", role="NONE" if role == "none" else quote(role))
            if lock_timeout_ms:
                self.run("SET LOCAL lock_timeout = {ms}", ms=str(lock_timeout_ms))
            self.run("LOCK TABLE {table} IN ACCESS SHARE MODE")
            self.outlive_timeouts()
            seen = self._seen()
            self.expect(seen[0][0])
            if not self.value(UNLOCKED, {"tables": [table[0] for table in seen]}):
                return seen
            self.rollback()
        raise MigrationError(
            f"{self.names['table']} gets new partitions all the time", hint="Run the same command again."
        )

    def _seen(self) -> Seen:
        return tuple(self.rows(SEEN, {"table": self.names["table"]}))

    def expect(self, table_oid: int) -> None:
        """Raises Changed where the table's name has been another's; what is known of that isn't true of this one."""
        if self._oids.setdefault(self.names["table"], table_oid) != table_oid:
            raise Changed(f"another table has got the name {self.names['table']}")

    def require_seen(self, seen: Seen) -> None:
        """Raises Changed unless the tables are those that were seen, under a lock that keeps them so.

        With a rewrite, another tree, other columns, or a trigger that was disabled for a while, what was found in the
        rows may not be so any more.
        """
        if self._seen() != seen:
            raise Changed(f"{self.names['table']} was changed since its rows were looked at")

    @contextmanager
    def attempt(self, *, keep: bool = True) -> Iterator[None]:
        """A part of the transaction that may fail; without `keep` it leaves nothing behind either way, locks included.

        Nothing of it stays on the server: subtransactions that aren't released would be there to the end.
        """
        self.run("SAVEPOINT openmemory_migrations")
        try:
            yield
        except BaseException:
            keep = False
            raise
        finally:
            if self.usable:
                if not keep:
                    self.run("ROLLBACK TO SAVEPOINT openmemory_migrations")
                self.run("RELEASE SAVEPOINT openmemory_migrations")

    def outlive_timeouts(self) -> None:
        """Not for the statements of a batch: a timeout of the role's on those is heeded, by smaller batches."""
        self.run("SET LOCAL idle_in_transaction_session_timeout = 0")
        if int(self.value("SELECT current_setting('server_version_num')")) >= 170_000:
            self.run("SET LOCAL transaction_timeout = 0")

    def borrow(self) -> None:
        """Sets in this transaction what was local to the host's: role, search_path."""
        for name, value in self._lent.items():
            self.set_local(name, value)

    @contextmanager
    def autocommit(self) -> Iterator[None]:
        """For statements that refuse a transaction; what was local to the host's transaction is set and reset."""
        self.commit()
        self.connection.dialect.set_isolation_level(self._raw, "AUTOCOMMIT")
        before = self._role_and_path() if self._lent else {}
        try:
            for name, value in self._lent.items():
                self.set_session(name, value)
            yield
        finally:
            if self.usable:
                for name in self._lent:
                    self.set_session(name, before[name])
                self.connection.dialect.set_isolation_level(self._raw, READ_COMMITTED)

    def set_session(self, name: str, value: str) -> None:
        self.run("SELECT set_config(:name, :value, false)", {"name": name, "value": value})

    @contextmanager
    def session(self) -> Iterator[None]:
        """Makes the connection fit for our work while it lasts: notices logged, signals heeded, no autocommit.

        Afterwards isolation level, autocommit, role and search_path are as they were.
        """
        dialect = self.connection.dialect
        if self._raw.autocommit:
            self._isolation = "AUTOCOMMIT"
            dialect.set_isolation_level(self._raw, READ_COMMITTED)

        def cancel() -> None:
            with suppress(Exception):  # the connection may be gone already
                self.driver.cancel()

        # Alembic's transaction is idle while we wait for another run
        self.outlive_timeouts()
        try:
            with self.driver.notices(log.server_message), listening(self.stop, cancel):
                yield
        finally:
            if self.usable:
                if self._isolation:
                    self.rollback()
                    dialect.set_isolation_level(self._raw, self._isolation)
                if self._isolation != "AUTOCOMMIT":
                    self.borrow()


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
