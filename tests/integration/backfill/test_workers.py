"""Several workers on one table, in one process and in two: nothing twice, nothing missed; reading ahead or in turn."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations.backfill import claims, reader
from openmemory_migrations.db import threads
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.steps import backfill
from tests.support.commands import alembic
from tests.support.engines import by_client
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, random_rows
from tests.support.package import package, run_backfill
from tests.support.sessions import all_at_once, converted, eventually, sessions
from tests.support.states import EXPAND

__all__ = ["by_client"]

ROWS, DIM, BATCH = 6_000, 64, 50  # some 4 units of pages


class Counting(PackageDatabase):
    """The package's connections; `written` counts the batches of each server process that writes."""

    written: Counter[int]

    def copy_in(self, table: str, data: bytes) -> None:
        self.written[self.driver.pid] += 1
        super().copy_in(table, data)


def counting() -> type[Counting]:
    return type("Counted", (Counting,), {"written": Counter()})


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(ROWS, DIM))
    alembic(database, "upgrade", EXPAND)
    pages: int = database.value(f"SELECT pg_relation_size('{TABLE}') / 8192")
    assert pages > 3 * reader.UNIT
    return database


def batches(pages: int) -> int:
    """At most: a batch ends where what is claimed ends."""
    return ROWS // BATCH + -(-pages // reader.UNIT)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_share_the_table_and_convert_every_row_once(table: Database, workers: int) -> None:
    v = checksum(table)
    pages: int = table.value(f"SELECT pg_relation_size('{TABLE}') / 8192")

    db = run_backfill(table, counting(), backfill_batch=BATCH, backfill_workers=workers)

    assert len(db.written) == min(workers, len(db.written)) > (workers > 1)
    assert ROWS // BATCH <= db.written.total() <= batches(pages)
    assert mismatches(table) == []
    assert checksum(table) == v
    assert table.value(f"SELECT count(v_vector) FROM {TABLE}") == ROWS


def test_two_runs_side_by_side_do_nothing_twice(table: Database) -> None:
    pages: int = table.value(f"SELECT pg_relation_size('{TABLE}') / 8192")
    makes = [counting(), counting()]

    all_at_once([partial(run_backfill, table, make, backfill_batch=BATCH, backfill_pause_ms=5) for make in makes])

    assert all(make.written for make in makes), "one of them has done it all"
    assert sum(make.written.total() for make in makes) <= batches(pages)
    assert mismatches(table) == []
    assert converted(table) == ROWS


def test_what_another_run_has_claimed_is_waited_for_but_not_for_ever(
    table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfill, "PATIENCE", 2)
    space = claims.space_of("public", TABLE, "v_vector")
    with package(table, PackageDatabase) as other, other.transaction():
        other.run("SELECT pg_advisory_xact_lock(CAST(:space AS integer), 1)", {"space": space})

        run_backfill(table, PackageDatabase, backfill_batch=BATCH)

        assert converted(table) == ROWS
    assert mismatches(table) == []


def test_one_reads_ahead_while_another_writes(table: Database) -> None:
    seen: list[int] = []

    class Looking(PackageDatabase):
        def copy_in(self, table_name: str, data: bytes) -> None:
            seen.append(sessions(table, extra="AND query LIKE '%SAVEPOINT openmemory_migrations'"))
            super().copy_in(table_name, data)

    run_backfill(table, Looking, backfill_batch=BATCH)

    assert len(seen) >= ROWS // BATCH
    assert any(seen)
    eventually(lambda: sessions(table) == 0)


@pytest.mark.parametrize("workers", [1, 3])
def test_where_there_is_no_connection_to_read_ahead_on_reading_and_writing_take_turns(
    table: Database, workers: int
) -> None:
    role = f"few_{table.name}"
    table.run(SQL("CREATE ROLE {} LOGIN CONNECTION LIMIT 3").format(Identifier(role)))
    try:
        owner = Identifier(role)
        table.run(SQL("GRANT CREATE, USAGE ON SCHEMA public TO {0}; GRANT {0} TO postgres").format(owner))
        for relation in (TABLE, "openmemory_alembic_version"):
            table.run(SQL("ALTER TABLE {} OWNER TO {}").format(Identifier(relation), owner))
        url = table.url.replace("postgres@", f"{role}@")

        log = alembic(Database(table.name, url), "upgrade", "head", env={"OM_BACKFILL_WORKERS": str(workers)}).stderr

        assert "no further connection: " in log
        assert ("The other workers have done its share" in log) == (workers > 1)
        assert "too many connections for role" in log
        assert "Reading and writing take turns" in log
        assert mismatches(table) == []
        assert converted(table) == ROWS
    finally:
        table.run(SQL("REASSIGN OWNED BY {0} TO postgres; DROP OWNED BY {0}; DROP ROLE {0}").format(Identifier(role)))


def test_who_leaves_does_not_wait_for_what_is_made_ahead(table: Database) -> None:
    """What reads is stopped and cancelled, not waited for."""
    with package(table, PackageDatabase) as db:
        with threads.ahead(db, lambda other: iter([other.value("SELECT 1")] * 100)) as made:
            assert next(made) == 1
        with threads.ahead(db, lambda other: iter([other.value("SELECT 1"), other.value("SELECT pg_sleep(600)")])):
            eventually(lambda: sessions(table, extra="AND query LIKE '%pg_sleep(600)%'"))
        with (
            pytest.raises(ZeroDivisionError),
            threads.ahead(db, lambda other: (1 // number for number in (1, 0))) as made,
        ):
            assert list(made) == []
    eventually(lambda: sessions(table) == 0)
