"""URL and TLS, and a connection that somebody else opened, with our own transactions on it.

Statements go through SQLAlchemy's `text()`, commits through the driver's own connection: that ends the server's
transaction under any env.py, while SQLAlchemy's and Alembic's transaction objects stay as they are.
"""

from __future__ import annotations

import asyncio
import copy
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, CursorResult, Engine, ExceptionContext
from sqlalchemy.exc import DBAPIError

from .. import log
from ..errors import Changed, MigrationError
from ..sql import SQL, Fragment, blocks, bound, fill, joined, literal, quote
from . import tries
from .drivers import driver_of
from .signals import Stop, listening
from .sqlerrors import CANCELED, DENIED, LOCK_NOT_AVAILABLE, PASSING, answered, as_migration_error, lost, sqlstate

BLOCKS = blocks("db")

APPLICATION_NAME = "openmemory-migrations"
READ_COMMITTED: Any = "READ COMMITTED"
PATH = "search_path"
NAMES_CATALOG = re.compile(r'(?:^|,)\s*"?pg_catalog"?\s*(?:,|$)', re.IGNORECASE)
# whatever the role or the database has: an error instead of a partial result where a policy would hide rows from this
# role, types by the names that we know, and nobody else's functions and operators, however near their types are
WHATEVER = {"row_security": "off", "quote_all_identifiers": "off", PATH: "pg_catalog, pg_temp"}
LOCK_TIMEOUT = "10s"  # of whatever has no shorter one of its own: nothing waits for ever
# CONCURRENTLY waits for old transactions one by one; a short timeout would cancel it and leave an invalid index
PATIENT_LOCK_TIMEOUT = "1h"
IDLE = "idle_session_timeout"

# the locks between runs that are ours: of what, the key, and the process that holds it, which may end unnoticed
HELD: ContextVar[tuple[tuple[str, int, int], ...]] = ContextVar("HELD", default=())
ASK_AGAIN = 2.0  # seconds, between batches
LOOKS = 10  # at a tree that others attach tables to

T = TypeVar("T")
Seen = tuple[Any, ...]  # the tables that were looked at: names, files, places in the tree, columns, triggers, functions


@contextmanager
def second_connection(engine: Engine) -> Iterator[Connection]:
    """A connection beside the one at work, from a pool of the same make: the engine's own may hold one only.

    Raises MigrationError for whatever the host's pool, connector or listener raises of its own.
    """
    beside = Engine(engine.pool.recreate(), engine.dialect, engine.url)
    try:
        with _connected(beside) as connection:
            connection = connection.execution_options(isolation_level="READ COMMITTED")
            Database(connection, {}).stay_idle()
            try:
                yield connection
            except BaseException:
                connection.invalidate()  # a ROLLBACK would wait for an answer that a dead network never brings
                raise
    finally:
        beside.dispose()  # or the pool would keep it


def _connected(engine: Engine) -> Connection:
    try:
        return engine.connect()
    except (DBAPIError, MigrationError):
        raise
    except Exception as error:
        # not its words, which may have a password in them
        raise MigrationError(
            f"the engine gives no further connection: {type(error).__name__}",
            detail="That is raised by its creator, its pool or a listener of its events.",
        ) from error


def no_timeouts(connection: Connection) -> dict[str, str]:
    """What keeps the timeouts of a role or database from ending a transaction of ours, or one of its statements."""
    timeouts = ["idle_in_transaction_session_timeout", "statement_timeout"]
    if (connection.dialect.server_version_info or (0,)) >= (17,):
        timeouts.append("transaction_timeout")
    return dict.fromkeys(timeouts, "0")


def _still_connected(context: ExceptionContext) -> None:
    """What a function of the host's raises may read as if the connection were lost; SQLAlchemy goes by the text."""
    if answered(context.original_exception) and context.connection and not driver_of(context.connection).closed:
        context.is_disconnect = False


def in_thread(engine: Engine, work: Callable[[], None]) -> None:
    """Runs `work` in a thread that isn't the engine's: an async driver needs an event loop of its own there."""
    if engine.dialect.is_async:
        asyncio.run(sa.util.greenlet_spawn(work))
    else:
        work()


@dataclass
class Host:
    """What whoever opened the connection has set for statements of its own."""

    path: str | None = None  # its search_path, for its session or its transaction
    local: dict[str, str] = field(default_factory=dict)  # role and search_path, where they were the transaction's only
    isolation: Any = None  # to put back


class Database:
    """Statements, transactions and COPY on one connection.

    SQL texts name our objects as `{table}`, `{vector}` …; `names` holds those, quoted. Values are `:parameters`.
    """

    def __init__(self, connection: Connection, names: Mapping[str, SQL]) -> None:
        self.connection = connection
        self.names = dict(names)
        self.stop = Stop()
        self.driver = driver_of(connection)
        if not sa.event.contains(connection.dialect, "handle_error", _still_connected):
            sa.event.listen(connection.dialect, "handle_error", _still_connected)
        self._errors: tuple[Any, ...] = (*self.driver.errors, connection.dialect.loaded_dbapi.Error)
        self._host = Host()  # for all that `at` has made of this
        self._session: dict[str, str] = {}  # settings of the session to put back, for all that `at` has made of this
        self._asked = 0.0  # when, whether the locks between runs are still held
        self._oids: dict[str, int] = {}  # of the tables that have been looked at, by their names

    @property
    def _raw(self) -> Any:
        self._require_connection()
        return self.connection.connection.dbapi_connection

    def _require_connection(self) -> None:
        """Or SQLAlchemy and the drivers have each an error of their own for what comes after the first."""
        if not self.usable:
            raise lost("database", "it is closed")

    @property
    def usable(self) -> bool:
        """Whether the connection is still there."""
        return not self.connection.invalidated and not self.driver.closed

    @cached_property
    def pooled(self) -> bool:
        """Whether a pooler such as PgBouncer stands between: it tells clients of another process than the server's."""
        return bool(self.driver.pid != self.value("SELECT pg_catalog.pg_backend_pid()"))

    def at(self, names: Mapping[str, SQL]) -> Database:
        """The same connection, with other names in the `{…}` of SQL texts."""
        other = copy.copy(self)
        other.names = {**self.names, **names}
        return other

    @contextmanager
    def beside(self, stop: Stop) -> Iterator[Database]:
        """The same on a connection of its own, for another thread, which `stop` stops."""
        with second_connection(self.connection.engine) as connection:
            other = type(self)(connection, self.names)
            other.stop, other._host = stop, self._host
            with other.driver.notices(log.server_message):
                yield other

    # -- statements

    def sql(self, template: str, **more: Fragment) -> SQL:
        return fill(template, {**self.names, **more})

    def run(
        self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: Fragment
    ) -> CursorResult[Any]:
        self._require_connection()
        with self._heeding_signals():
            return self.connection.execute(sa.text(fill(template, {**self.names, **names}, bound)), parameters or {})

    def rows(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: Fragment) -> Sequence[Any]:
        return self.run(template, parameters, **names).all()

    def value(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: Fragment) -> Any:
        return self.run(template, parameters, **names).scalar()

    def quietly(self, template: str, /, **names: Fragment) -> None:
        """Without the server's NOTICE that there is nothing to drop; inside a transaction."""
        with self.local({"client_min_messages": "warning"}):
            self.run(template, **names)

    def copy_out(self, template: str, /, **names: Fragment) -> bytes | memoryview:
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
            lost = self.driver.closed or (
                not answered(error) and self.connection.dialect.is_disconnect(error, self._raw, None)
            )
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
        if self._host.isolation is None:
            with self._wrapping_errors("SHOW transaction_isolation"):
                self._host.isolation = dialect.get_isolation_level(self._raw)
            self.commit()
        # also where it is that already: behind a pooler the next transaction may be on a connection where it isn't
        self._set_isolation(READ_COMMITTED)
        now = self._role_and_path()
        self._host.local = {name: value for name, value in local.items() if now[name] != value}
        self.stay_idle()

    def stay_idle(self) -> None:
        """Keeps the session, while others work or wait, from an idle_session_timeout of the role's.

        Behind a pooler in transaction mode it isn't ours: there the pooler sees to it.
        """
        if IDLE not in self._session and not self.pooled:
            self._session |= self._settings(IDLE)
            self.set_session(IDLE, "0")
        self.commit()

    def _set_isolation(self, level: Any) -> None:
        with self._wrapping_errors("SET SESSION CHARACTERISTICS"):
            self.connection.dialect.set_isolation_level(self._raw, level)

    def renew(self) -> None:
        """Takes over a transaction whose snapshot may be older than what has been waited for since it began."""
        if self.value("SHOW transaction_isolation") != "read committed":
            self.take_over()

    def _role_and_path(self) -> dict[str, str]:
        return self._settings("role", PATH)

    @property
    def host_path(self) -> str:
        """The search_path of whoever opened the connection; asked before ours is set."""
        if self._host.path is None:
            # SHOW takes no snapshot
            self._host.path = self.connection.info.get(PATH) or str(self.value("SHOW search_path"))
        return self._host.path

    @property
    def path_of_rows(self) -> str:
        """The same with pg_catalog first where it is named: else whoever may create in a schema before it has an
        operator or function of the server's called as theirs."""
        path = self.host_path
        return f"pg_catalog, {path}" if NAMES_CATALOG.search(path) else path

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
        with self.local({**WHATEVER, "statement_timeout": "0", "lock_timeout": LOCK_TIMEOUT}):
            self._wait_for_table()
            yield

    def _wait_for_table(self) -> None:
        """For who can't begin the transaction again: waits until nobody keeps the table from its readers, and lets go.

        Where there is no such table, or no right, whoever looks at it next says so.
        """

        def undo() -> None:
            self.run("ROLLBACK TO SAVEPOINT openmemory_migrations")

        def lock() -> None:
            self.run("LOCK TABLE {table} IN ACCESS SHARE MODE")

        self.run("SAVEPOINT openmemory_migrations")
        try:
            self.patiently(lock, undo)
        except DBAPIError as error:
            if sqlstate(error) in (None, LOCK_NOT_AVAILABLE, CANCELED):
                raise
        undo()
        self.run("RELEASE SAVEPOINT openmemory_migrations")

    @contextmanager
    def local(self, settings: Mapping[str, str]) -> Iterator[None]:
        """Sets them inside the transaction and puts them back; after an error the rollback does that."""
        before = self._settings(*settings)
        self.set_local(settings)
        yield
        self.set_local(before)

    def _settings(self, *names: str) -> dict[str, str]:
        ((*values,),) = self.rows("SELECT " + ", ".join(f"pg_catalog.current_setting('{name}')" for name in names))
        return dict(zip(names, values, strict=True))

    def set_local(self, settings: Mapping[str, str]) -> None:
        """Inside the transaction, in one statement.

        As constants: what psycopg2 binds depends on the standard_conforming_strings that the session began with.
        """
        call = "pg_catalog.set_config({name|literal}, {value|literal}, true)"
        calls = [fill(call, {"name": name, "value": value}) for name, value in settings.items()]
        self.run("SELECT {calls}", calls=joined(", ", calls))

    @contextmanager
    def transaction(
        self,
        *,
        snapshot: bool = False,
        batch: bool = False,
        lock_timeout_ms: int = 0,
        settings: Mapping[str, str] | None = None,
    ) -> Iterator[Seen]:
        """Commits at the end, rolls back on any exception; what was open before must have been committed.

        No timeout of the role's ends it; but the statements of a `batch` heed statement_timeout, by smaller batches.
        With `snapshot`: read-only, all statements see the same rows.
        Nobody can drop or rewrite the table meanwhile: the snapshot is taken under a lock on it, since a table that
        was rewritten is empty to an older one. It is waited for in one try of `lock_timeout_ms`, else in longer ones.
        Yields what was looked at, for whoever decides by it in a later transaction (`require_seen`).
        """
        self.stop.check()
        own = {"lock_timeout": LOCK_TIMEOUT, **WHATEVER, **(settings or {})}
        if batch:  # a trigger of the host's may say what is in a row
            own["client_min_messages"] = "error"

        def begin() -> Seen:
            seen: Seen = ()
            if snapshot:
                seen = self._take_snapshot(lock_timeout_ms, own)
            else:
                self.outlive_timeouts(own, batch=batch)
                if not batch or time.monotonic() - self._asked > ASK_AGAIN:
                    self._require_locks()
            self.borrow()
            return seen

        begun = False
        try:
            seen = self.patiently(begin, self.rollback, 1 if lock_timeout_ms else None)
            begun = True
            yield seen
            self.commit()
        except BaseException as error:
            with suppress(DBAPIError, MigrationError):  # that one says more
                self.rollback()
                self._explain(error)
                if snapshot and not begun and isinstance(error, DBAPIError) and sqlstate(error) == DENIED:
                    error.add_detail(f"HINT:  {self.grant}")
                self.rollback()
            raise

    def _require_locks(self) -> None:
        """Raises ConnectionLost where a lock between runs isn't ours any more: another run may be at work."""
        for what, key, pid in HELD.get():
            if not self.value(BLOCKS.still_held, {"key": key, "pid": pid}):
                raise lost(f"this run's lock on {what}", f"process {pid}, which held it, has ended")
        self._asked = time.monotonic()

    def _take_snapshot(self, lock_timeout_ms: int, own: Mapping[str, str]) -> Seen:
        """Locks the whole tree, then looks: a table that is attached while the lock is waited for isn't locked."""
        for _ in range(LOOKS):
            self.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            timeouts = {name: value for name, value in own.items() if name not in WHATEVER}
            self.outlive_timeouts(timeouts, before_snapshot=True)
            # before anything that takes the snapshot, as the first SELECT does; by the role that may
            if role := self._host.local.get("role"):
                self.run("SET LOCAL ROLE {role}", role=SQL("NONE") if role == "none" else quote(role))
            if lock_timeout_ms:
                self.run("SET LOCAL lock_timeout = {ms}", ms=lock_timeout_ms)
            self.run("LOCK TABLE {table} IN ACCESS SHARE MODE")
            self.set_local(WHATEVER)
            seen = self._seen()
            self.expect(seen[0][0])
            if not self.value(BLOCKS.not_locked, {"tables": [table[0] for table in seen]}):
                return seen
            self.rollback()
        raise MigrationError(
            f"{self.names['table']} gets new partitions all the time", hint="Run the same command again."
        )

    def _seen(self) -> Seen:
        return tuple(self.rows(BLOCKS.seen, {"table": self.names["table"]}))

    def expect(self, table_oid: int) -> None:
        """Raises Changed where the table's name has been another's; what is known of that isn't true of this one."""
        if self._oids.setdefault(self.names["table"], table_oid) != table_oid:
            raise Changed(f"another table has got the name {self.names['table']}")

    def require_seen(self, seen: Seen) -> None:
        """Raises Changed unless the tables are those that were seen, under a lock that keeps them so.

        With a rewrite, another tree, other columns, or a trigger that was disabled for a while, what was found in the
        rows may not be so any more.
        """
        self._require_locks()  # without which nobody is kept from writing what was not there to be seen
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

    def patiently(self, begin: Callable[[], T], undo: Callable[[], None], most: int | None = None) -> T:
        """Begins a transaction, again where its lock on the table can't be had yet; nobody waits behind a reader's."""
        left = most or tries.TRIES
        while True:
            try:
                return begin()
            except DBAPIError as error:
                if sqlstate(error) != LOCK_NOT_AVAILABLE:
                    raise
                undo()
                self._explain(error)
                undo()
                left -= 1
                if not left:
                    raise
                problem = as_migration_error(error, f"waiting for {self.names['table']}")
            log.notice(problem.message, detail=problem.detail)
            self.stop.check()

    def _explain(self, error: BaseException) -> None:
        """Has a lock_timeout say who was in the way."""
        if (
            isinstance(error, DBAPIError)
            and sqlstate(error) == LOCK_NOT_AVAILABLE
            and not any(line.startswith("DETAIL") for line in error.detail)
        ):
            error.add_detail(f"DETAIL:  {self.in_the_way()}")

    @property
    def grant(self) -> str:
        """The line that lets this role read the table, whichever of the two rights it lacks."""
        role = quote(self.value("SELECT current_user"))
        return self.sql("GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT SELECT ON {table} TO {role};", role=role)

    def holders(self, table_oid: int | None = None, seconds: int = 0) -> list[str]:
        """Who has held a lock on the table, that of this name if not another, for so long; never the text of a query.

        What is said of each: process, application and since when.
        """
        table = table_oid or fill("pg_catalog.to_regclass({table|literal})", self.names)
        return [holder for (holder,) in self.rows(BLOCKS.holders, of_table=table, seconds=seconds)]

    def in_the_way(self, table_oid: int | None = None) -> str:
        found = self.holders(table_oid)
        return (
            "Locks on the table are held by " + "; ".join(found) if found else "No lock on the table is held now"
        ) + "."

    def outlive_timeouts(
        self, more: Mapping[str, str] | None = None, *, batch: bool = False, before_snapshot: bool = False
    ) -> None:
        """Sets ours in place of the role's timeouts, and `more`; the first thing in each transaction that works."""
        _ = self.host_path  # as long as it can be seen
        wanted = {**no_timeouts(self.connection), **(more or {})}
        if batch:
            del wanted["statement_timeout"]
        if before_snapshot:  # which the SELECT would take
            for name, value in wanted.items():
                self.run("SET LOCAL {name} = {value}", name=SQL(name), value=literal(value))
        else:
            self.set_local(wanted)

    def as_host(self) -> None:
        """From here to the end of the transaction, with its commit, what the host's rows have (triggers, checks,
        defaults) finds what it names by the host's search_path; all else is to be qualified."""
        self.set_local({PATH: self.path_of_rows})

    def shelter(self) -> None:
        """In a transaction of Alembic's on a connection of ours: its own statements find nobody else's names either."""
        self.connection.info.setdefault(PATH, self.host_path)
        self.set_local({PATH: WHATEVER[PATH]})

    def borrow(self) -> None:
        """Sets in this transaction the role that was local to the host's."""
        if role := self._host.local.get("role"):
            self.set_local({"role": role})

    @contextmanager
    def autocommit(self, **settings: str) -> Iterator[None]:
        """For statements that refuse a transaction: what it would have set locally, and `settings`, the session has.

        Behind a pooler in transaction mode those would stay with a server process that other clients use: there the
        statement runs with what the role has, and an error names the line that changes it.
        """
        _ = self.host_path
        self.set_local(WHATEVER)
        self._require_locks()
        own = {**no_timeouts(self.connection), **WHATEVER, "lock_timeout": PATIENT_LOCK_TIMEOUT, **settings}
        own["default_transaction_isolation"] = "read committed"
        hint = self._through_pooler(own) if self.pooled else None
        wanted = {} if self.pooled else own
        if role := self._host.local.get("role"):
            wanted = {**wanted, "role": role}
        self.commit()
        self._set_isolation("AUTOCOMMIT")
        before = self._settings(*wanted) if wanted else {}

        def put_back() -> None:
            if self.usable:
                for name, value in before.items():
                    self.set_session(name, value)
                self._set_isolation(READ_COMMITTED)

        try:
            for name, value in wanted.items():
                self.set_session(name, value)
            yield
        except BaseException as error:
            if hint and isinstance(error, DBAPIError) and (error.connection_invalidated or sqlstate(error) in PASSING):
                error.add_detail(f"HINT:  {hint}")
            with suppress(DBAPIError, MigrationError):  # that one says more
                put_back()
                self._explain(error)
                self.rollback()
            raise
        put_back()

    def _through_pooler(self, wanted: Mapping[str, str]) -> str | None:
        """What to say of an error, where the role has timeouts that CONCURRENTLY is going to run with."""
        log.notice(
            "a pooler such as PgBouncer is in between: CONCURRENTLY runs with the timeouts and memory of the role"
        )
        asked = self._settings(*wanted)
        role, database = map(quote, self.rows("SELECT session_user, current_database()")[0])
        lines = [
            f"ALTER ROLE {role} IN DATABASE {database} SET {name} = {literal(wanted[name])};"
            for name, value in asked.items()
            if name.endswith("_timeout") and not name.startswith("idle") and value != "0"
        ]
        return f"Connect directly, or: {' '.join(lines)} Then have the pooler connect anew." if lines else None

    def set_session(self, name: str, value: str) -> None:
        self.run("SELECT pg_catalog.set_config(:name, :value, false)", {"name": name, "value": value})

    @contextmanager
    def session(self) -> Iterator[None]:
        """Makes the connection fit for our work while it lasts: notices logged, signals heeded, no autocommit.

        Afterwards isolation level, autocommit, role and search_path are as they were.
        """
        if self.driver.autocommit:
            self._host.isolation = "AUTOCOMMIT"
            self._set_isolation(READ_COMMITTED)

        def cancel() -> None:
            with suppress(Exception):  # the connection may be gone already
                self.driver.cancel()

        # Alembic's transaction is idle while we wait for another run; its statements are its own
        self.outlive_timeouts(batch=True)
        try:
            with self.driver.notices(log.server_message), listening(self.stop, cancel):
                try:
                    yield
                except BaseException:
                    if not self.usable:
                        self.stop.check()  # or who was told to stop would connect again
                    raise
        except BaseException:
            with suppress(DBAPIError, MigrationError):  # that one says more
                self._put_back()
            raise
        # also asks whether the connection is still there, before Alembic stamps through it
        self._put_back()

    def _put_back(self) -> None:
        if self._host.isolation or self._session:
            self.rollback()
        while self._session:
            self.set_session(*self._session.popitem())
            self.commit()
        if self._host.isolation:
            self._set_isolation(self._host.isolation)
        if self._host.isolation != "AUTOCOMMIT" and self._host.local:
            self.set_local(self._host.local)


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
