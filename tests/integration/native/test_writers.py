"""Newer OpenMemory at full speed while its `v` gets dimensions and index, and loses both: nothing lost or stale."""

from __future__ import annotations

from contextlib import closing

import pytest

from demo.openmemory import TABLE
from tests.support.commands import alembic, result, start_alembic
from tests.support.interruption import kill, wait_until_gone
from tests.support.native import INDEX, START, NewerWriter, create_newer, typed, wrong
from tests.support.openmemory import Database, random_rows
from tests.support.sessions import eventually, sessions
from tests.support.states import BACKFILL, EXPAND, HEAD, column_type, indexes, stamp
from tests.support.writers import writing

pytestmark = pytest.mark.slow

DIM = 16
DATA = random_rows(4_000, DIM)
SLOWLY = {"BACKFILL_BATCH": "100", "OM_BACKFILL_PAUSE_MS": "10"}


@pytest.fixture
def table(database: Database) -> Database:
    create_newer(database, DATA)
    return database


def test_the_whole_chain_up_and_down_and_up_while_it_writes(table: Database) -> None:
    with writing(table, DATA, kind=NewerWriter) as writers:
        alembic(table, "upgrade", "head", env=SLOWLY)
        assert column_type(table, "v") == f"vector({DIM})"
        table.run(START)
        alembic(table, "downgrade", "base")
        assert column_type(table, "v") == "vector"
        alembic(table, "upgrade", "head")

    rows = {key: v for writer in writers for key, v in writer.rows.items()}
    assert sum(writer.writes for writer in writers) > 500
    assert max(writer.longest_wait for writer in writers) < 5
    assert wrong(table, rows) == []
    assert list(indexes(table)) == [INDEX]
    assert stamp(table) == [HEAD]


def test_killed_again_and_again_while_it_writes(table: Database) -> None:
    with writing(table, DATA, kind=NewerWriter) as writers:
        for share in (0.2, 0.5, 0.8):
            process = start_alembic(table, "upgrade", BACKFILL, env=SLOWLY)
            eventually(lambda share=share: typed(table) > len(DATA) * share)  # type: ignore[misc]
            kill(process)
            wait_until_gone(table)
        alembic(table, "upgrade", "head")

    assert wrong(table, {key: v for writer in writers for key, v in writer.rows.items()}) == []
    assert column_type(table, "v") == f"vector({DIM})"


def test_two_runs_at_once(table: Database) -> None:
    first = start_alembic(table, "upgrade", "head", env=SLOWLY)
    eventually(lambda: typed(table))
    second = start_alembic(table, "upgrade", "head", env=SLOWLY)

    done = [result(first), result(second)]

    assert [one.returncode for one in done] == [0, 0], done[0].log + done[1].log
    assert "waiting for another run" in done[1].log
    assert wrong(table, DATA) == []


@pytest.mark.exhaustive
def test_rows_that_another_transaction_has_locked_are_waited_for(table: Database) -> None:
    alembic(table, "upgrade", EXPAND)
    with closing(table.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(f"UPDATE {TABLE} SET user_id = 'moved' WHERE sector = 'semantic'")
        process = start_alembic(table, "upgrade", "head", env={"OM_LOCK_TIMEOUT_MS": "20"})
        eventually(lambda: sessions(table, extra="AND wait_event_type = 'Lock' AND query LIKE '%UPDATE ONLY%'"))
        connection.commit()

    done = result(process)

    assert done.returncode == 0, done.log
    assert wrong(table, DATA) == []
