"""Findings about what env.py does when it runs: connection, driver, transaction."""

from __future__ import annotations

from collections.abc import Iterator

from ..db.drivers import refused
from ..finding import Finding
from .probe import Observed, Seen


def whole(observed: Observed, *, guarded: bool) -> Iterator[Finding]:
    """`guarded` if our revisions ask for the database that they are run on."""
    if observed.unreachable:
        yield Finding(
            "error",
            "no-connection",
            f"env.py can't connect: {observed.error}",
            "What depends on the database was not looked at.",
            "alembic current must be able to connect; -x and environment variables are passed on to env.py.",
        )
    elif observed.error:
        yield Finding(
            "error",
            "env-fails",
            f"env.py stops with an error: {observed.error}",
            f"At {observed.where}." if observed.where else None,
            "alembic current shows it in full.",
        )
    elif not observed.seen:
        yield Finding(
            "error",
            "env-runs-nothing",
            "env.py runs no migrations",
            "It came to its end without calling context.run_migrations().",
            "with context.begin_transaction():\n    context.run_migrations()",
        )
    for statement in dict.fromkeys(observed.writes):
        yield Finding(
            "notice",
            "env-writes",
            f"env.py writes to the database itself: {_short(statement)}",
            "The doctor didn't send that statement; every alembic command does, even alembic current.",
        )
    if len(observed.seen) > 1 and not guarded:
        yield Finding(
            "warning",
            "several-databases",
            f"env.py runs the revisions on {len(observed.seen)} databases",
            "A step stops with an error on a database that has no such table.",
            'openmemory-migrations stubs --engine-name NAME; in a file: if kw.get("engine_name") == "NAME":',
        )


def _short(statement: str) -> str:
    line = " ".join(statement.split())
    return line if len(line) <= 60 else line[:59] + "…"


def database(seen: Seen, *, several: bool) -> Iterator[Finding]:
    dialect = seen.connection.dialect
    if dialect.name == "sqlite":
        yield Finding("notice", "sqlite", "SQLite keeps vectors as bytes: the steps are stamped and do nothing")
        return
    if dialect.name != "postgresql":
        yield Finding(
            "warning" if several else "error",
            "not-postgresql",
            f'"{dialect.name}" is not PostgreSQL, and the steps stop there',
            hint='def upgrade(**kw): if kw.get("engine_name") == "NAME": …' if several else None,
        )
        return
    if error := refused(dialect.driver, dialect.is_async):
        yield Finding.of("driver", error)
    yield from _transaction(seen)


def _transaction(seen: Seen) -> Iterator[Finding]:
    if seen.nested or seen.two_phase:
        what = "a SAVEPOINT (begin_nested)" if seen.nested else "a two-phase transaction (begin_twophase)"
        yield Finding(
            "error",
            "two-phase" if seen.two_phase else "savepoint",
            f"env.py runs the migrations inside {what}",
            "There no batch can be committed, and the steps refuse to begin.",
            "USE_TWOPHASE = False, or connection.begin() instead of connection.begin_twophase()"
            if seen.two_phase
            else "connection.begin() instead of connection.begin_nested(), or neither and context.begin_transaction()",
        )
    elif seen.ours or seen.own or seen.autocommit:
        return
    elif seen.committed:
        yield _owner(seen)
    elif seen.before:
        yield Finding(
            "error",
            "sql-before-configure",
            f"env.py executes SQL before context.configure() and never commits: {_short(seen.before[0])}",
            "The statement opens a transaction that Alembic takes for env.py's own and leaves alone, so that the stamp"
            " of every revision is rolled back at the end, with exit code 0.",
            "connection.commit()  # after that statement, before context.configure(); a SET stays in force",
        )
    else:
        yield Finding(
            "error",
            "never-commits",
            "env.py never commits",
            "Your own revisions are rolled back, with exit code 0. "
            + (
                "The batches of the steps stay, since they commit them, without the stamp."
                if seen.external
                else "The steps refuse to begin."
            ),
            "with context.begin_transaction():\n    context.run_migrations()"
            if not seen.external
            else "with connection.begin():  # or engine.begin(): commits at its end",
        )


def _owner(seen: Seen) -> Finding:
    if not seen.external:
        return Finding(
            "error",
            "no-begin-transaction",
            "env.py commits after the migrations, but not by context.begin_transaction()",
            "A step sees neither a transaction of env.py's own nor one of Alembic's, and refuses to begin.",
            "with context.begin_transaction():\n    context.run_migrations()",
        )
    local = " What SET LOCAL set is gone with that, but for role and search_path." if seen.before else ""
    return Finding(
        "notice",
        "env-owns-transaction",
        "env.py owns the transaction",
        "That works. The first step commits it all the same: revisions that ran earlier in the same alembic upgrade"
        f" stay when a later one fails.{local}",
    )


__all__ = ["database", "whole"]
