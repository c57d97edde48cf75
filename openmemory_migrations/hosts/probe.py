"""Runs a host's env.py as `alembic current` does and notes what it does with connections and transactions.

Changes nothing in the database: no revision runs, and a statement of env.py's own that would write isn't sent; a
function that writes, called in a SELECT, is not seen through.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from ..db.sqlerrors import as_migration_error
from ..errors import MigrationError

READS = re.compile(
    r"""(?: \s | --[^\n]*\n | /\*.*?\*/ )*
    (?: (?: SELECT|SHOW|SET|RESET|DISCARD|VALUES|TABLE|EXPLAIN|LOCK|BEGIN|COMMIT|ROLLBACK|SAVEPOINT|RELEASE ) \b
      | WITH \b (?! .* \b (?: INSERT|UPDATE|DELETE|MERGE ) \b ) )""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
NOTHING = "SELECT 1"


class SeenEnough(Exception):
    """Ends an env.py that would go on to PREPARE TRANSACTION."""


@dataclass
class Seen:
    """One database that env.py runs the migrations on, as a revision would find it."""

    connection: Connection
    heads: tuple[str, ...]  # what is in the version table
    version_table: str
    before: list[str]  # statements on this connection before context.configure()
    external: bool  # a transaction was open at context.configure(), so that Alembic begins and commits none
    own: bool  # Alembic's own transaction, around all steps or around each
    nested: bool
    two_phase: bool
    autocommit: bool
    ours: bool  # env.py is this package's own, which commits after each step
    committed: bool = False  # by SQLAlchemy, after the migrations


@dataclass
class Observed:
    seen: list[Seen] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)  # of env.py's own, not sent
    error: str | None = None
    where: str | None = None  # file and line in the host's env.py
    unreachable: bool = False  # the error is that of connecting


def run(config: Config, script: ScriptDirectory) -> Observed:
    """Runs env.py once, to its end. Never raises: what went wrong is in `error`."""
    observed = Observed()
    statements: list[tuple[Connection, str]] = []
    progress = {"connecting": 0, "connected": 0}

    def look(heads: Any, context: MigrationContext) -> Iterable[Any]:
        assert context.connection is not None
        before = [statement for connection, statement in statements if connection is context.connection]
        seen = _look(context, heads, before)
        observed.seen.append(seen)
        if seen.two_phase:
            raise SeenEnough
        return []

    environment = EnvironmentContext(config, script, fn=look, dont_mutate=True)

    def statement(
        connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> tuple[str, Any]:
        if not _is_configured(environment, connection):
            statements.append((connection, statement))
        if READS.match(statement) or connection.dialect.name != "postgresql":
            return statement, parameters
        observed.writes.append(statement)
        return NOTHING, type(parameters)()

    def committed(connection: Connection, *_: Any) -> None:
        for seen in observed.seen:
            seen.committed = seen.committed or seen.connection is connection

    def connecting(*_: Any) -> None:
        progress["connecting"] += 1

    def connected(*_: Any) -> None:
        progress["connected"] += 1

    with (
        _listening("before_cursor_execute", statement, retval=True),
        _listening("commit", committed),
        _listening("commit_twophase", committed),
        _listening("do_connect", connecting),
        _listening("engine_connect", connected),
        _quiet(),
        environment,
    ):
        try:
            script.run_env()
        except SeenEnough:
            pass
        except (Exception, SystemExit) as error:
            observed.error = _described(error)
            observed.where = _place(error, script)
            observed.unreachable = progress["connecting"] > progress["connected"]
    return observed


def _look(context: MigrationContext, heads: Any, before: list[str]) -> Seen:
    connection = context.connection
    assert connection is not None
    raw: Any = connection.connection.dbapi_connection
    callbacks = getattr(context, "on_version_apply_callbacks", ())
    return Seen(
        connection=connection,
        heads=tuple(heads),
        version_table=".".join(name for name in (context.version_table_schema, context.version_table) if name),
        before=before,
        external=context._in_external_transaction,
        own=not context._in_external_transaction
        and (context._transaction is not None or context._transaction_per_migration),
        nested=connection.in_nested_transaction(),
        two_phase=isinstance(connection.get_transaction(), sa.TwoPhaseTransaction),
        autocommit=bool(getattr(raw, "autocommit", False)),
        ours=any(callback.__module__ == "openmemory_migrations.environment" for callback in callbacks),
    )


def _is_configured(environment: EnvironmentContext, connection: Connection) -> bool:
    try:
        return environment.get_context().connection is connection
    except Exception:  # nothing is configured yet
        return False


@contextmanager
def _listening(event: str, listener: Any, **how: Any) -> Iterator[None]:
    """On every engine: env.py makes its own, and an AsyncEngine has one of these inside."""
    sa.event.listen(Engine, event, listener, **how)
    try:
        yield
    finally:
        sa.event.remove(Engine, event, listener)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps env.py's prints out of stdout, which is for findings, and Alembic's log and warnings out of stderr."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _described(error: BaseException) -> str:
    if isinstance(error, MigrationError):
        return error.message
    if isinstance(error, DBAPIError):
        return as_migration_error(error, "database").message.removeprefix("database: ")
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _place(error: BaseException, script: ScriptDirectory) -> str | None:
    """The last line of the host's own that the error came through, which need not be env.py's."""
    folder = Path(script.dir).absolute()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).absolute().is_relative_to(folder):
            return f"{frame.filename}, line {frame.lineno}"
    return None


__all__ = ["Observed", "Seen", "run"]
