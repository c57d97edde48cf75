"""R12: connections beside a host's are closed, and what its pool or connector raises is handled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal

import psycopg2
import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.engine import Engine

from openmemory_migrations import ops
from openmemory_migrations.errors import MigrationError
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows

SESSIONS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
                                        AND backend_type = 'client backend'
"""
STEPS = (ops.upgrade_expand, ops.upgrade_backfill, ops.upgrade_finalize)
Connect = Callable[[], object]


class Theirs(Exception):
    """As the connector of a cloud provider has them, with whatever is in it."""


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(300, 8))
    return database


def run(engine: Engine, by: Literal["client", "native"] = "client", workers: int = 2) -> None:
    """In this process, as an application does when it starts."""
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        with context.begin_transaction(), Operations.context(context):
            for step in STEPS:
                step(engine=by, workers=workers)


@pytest.mark.parametrize("engine", ["client", "native"])
def test_a_hosts_process_keeps_the_connections_that_it_had(
    table: Database, engine: Literal["client", "native"]
) -> None:
    pool = sa.create_engine(table.url.replace("postgresql:", "postgresql+psycopg2:"), pool_size=3)
    run(pool, engine)

    assert mismatches(table) == []
    assert table.value(SESSIONS) == 1  # the pool's own, which the host has opened
    pool.dispose()


def test_it_has_no_more_at_once_than_the_readme_says(table: Database) -> None:
    """The step's, the one that holds the lock between runs, the reader's, and the progress of a build."""
    most = 0

    def connected(*_: object) -> None:
        nonlocal most
        most = max(most, int(table.value(SESSIONS)))

    pool = sa.create_engine(table.url.replace("postgresql:", "postgresql+psycopg2:"))
    sa.event.listen(pool, "connect", connected)
    run(pool, workers=1)
    assert most <= 4
    pool.dispose()


def limited(table: Database, most: int) -> Connect:
    made = 0

    def connect() -> object:
        nonlocal made
        made += 1
        if made > most:
            raise Theirs("password=secret")
        return psycopg2.connect(table.url)

    return connect


def test_a_connection_that_is_optional_may_be_refused_in_whatever_way(
    table: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def connect() -> object:
        if threading.current_thread() is not threading.main_thread():
            raise Theirs("password=secret")
        return psycopg2.connect(table.url)

    pool = sa.create_engine("postgresql+psycopg2://", creator=connect)
    with caplog.at_level(logging.INFO):
        run(pool, workers=3)
    assert mismatches(table) == []
    assert "the engine gives no further connection: Theirs" in caplog.text
    assert "secret" not in caplog.text
    pool.dispose()


def test_one_that_is_needed_is_an_error_of_ours(table: Database) -> None:
    pool = sa.create_engine("postgresql+psycopg2://", creator=limited(table, 1))
    with pytest.raises(MigrationError, match="no further connection: Theirs") as raised:
        run(pool)
    assert "secret" not in str(raised.value)
    assert table.value(SESSIONS) <= 1
    pool.dispose()
