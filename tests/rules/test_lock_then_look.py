"""R1: a snapshot is taken only under a lock on the table: to an older one a table that was rewritten is empty."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

import psycopg2
import pytest
from sqlalchemy.exc import DBAPIError

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.db.database import Database as PackageDatabase
from tests.support.commands import NOTHING, alembic, om
from tests.support.native import create_newer, wrong
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, random_rows
from tests.support.package import package
from tests.support.proxy import Verdict, proxy
from tests.support.sessions import eventually, logged_statements
from tests.support.states import EXPAND, HEAD, column_type, stamp

DIM = 8
ROWS = random_rows(300, DIM)
SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
LOCK = "IN ACCESS SHARE MODE"
CUTOVER = ("-n", "cutover")
# every row anew, and nothing else: unlike CLUSTER it leaves nothing for older snapshots
REWRITE = f"ALTER TABLE {TABLE} ALTER user_id TYPE text USING user_id || ''"


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, ROWS)
    return database


def test_a_snapshot_that_waited_for_a_rewrite_sees_the_rows(table: Database) -> None:
    seen: list[int] = []

    def look() -> None:
        with package(table, PackageDatabase) as db:
            db.take_over()
            with db.transaction(snapshot=True):
                seen.append(db.value("SELECT count(*) FROM {table}"))

    with closing(table.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(REWRITE)
        thread = threading.Thread(target=look)
        thread.start()
        eventually(lambda: table.rows("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        connection.commit()
        thread.join()
    assert seen == [len(ROWS)]


def test_the_lock_is_taken_by_the_role_that_the_hosts_transaction_had(
    server: embedded.Server, table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openmemory_migrations.db.tries.TRIES", 2)
    monkeypatch.setattr("openmemory_migrations.db.database.LOCK_TIMEOUT", "50ms")
    owner, login = f"owner of {table.name}", f"login of {table.name}"
    table.run(f'CREATE ROLE "{owner}"; ALTER TABLE {TABLE} OWNER TO "{owner}"')
    table.run(f'CREATE ROLE "{login}" LOGIN NOINHERIT IN ROLE "{owner}"')
    try:
        with package(Database(table.name, server.url(table.name, user=login)), PackageDatabase) as db:
            db.run(f'SET LOCAL ROLE "{owner}"')
            db.take_over()
            with db.transaction(snapshot=True):
                assert db.value("SELECT count(*) FROM {table}") == len(ROWS)
            with closing(table.connect()) as connection, connection.cursor() as cursor:
                connection.autocommit = False
                cursor.execute(REWRITE)
                with pytest.raises(DBAPIError, match="lock timeout"), db.transaction(snapshot=True):
                    pass
    finally:
        table.run(f'DROP OWNED BY "{owner}", "{login}"; DROP ROLE "{owner}", "{login}"')


@pytest.mark.slow
def test_no_command_takes_a_snapshot_before_it_has_a_lock(table: Database) -> None:
    swap = {"OM_CUTOVER": "swap"}
    steps: list[tuple[tuple[str, ...], Mapping[str, str]]] = [
        (("upgrade", "head"), NOTHING),
        ((*CUTOVER, "upgrade", "head"), swap),
        ((*CUTOVER, "downgrade", "base"), swap),
        (("downgrade", "base"), NOTHING),
        (("upgrade", "head"), {"OM_BACKFILL_ENGINE": "server", "OM_BACKFILL_WORKERS": "2"}),
    ]
    with logged_statements(table) as statements:
        for command, env in steps:
            alembic(table, *command, env=env)
        for name in ("check", "status", "verify", "tune", "index", "backfill"):
            om(table, name)
        om(table, "report", "--output", "/dev/null")
    by_process: dict[str, list[str]] = {}
    for process, text in statements:
        by_process.setdefault(process, []).append(text)

    found = [
        next(text for text in texts[place:] if not text.startswith(("SET ", "BEGIN")))
        for texts in by_process.values()
        for place, text in enumerate(texts)
        if "REPEATABLE READ" in text
    ]

    assert len(found) > 20
    assert [text for text in found if not (text.startswith("LOCK TABLE ") and text.endswith(LOCK))] == []


@contextmanager
def rewritten(server: embedded.Server, database: Database) -> Iterator[Database]:
    """Every snapshot of the run begins while somebody's rewrite of the table isn't committed yet."""
    rewrites = 0

    def rewrite(has_lock: threading.Event) -> None:
        nonlocal rewrites
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            connection.autocommit = False
            cursor.execute("SET lock_timeout = '2s'")
            try:
                cursor.execute(REWRITE)
                rewrites += 1
            except psycopg2.errors.LockNotAvailable:
                connection.rollback()
            has_lock.set()
            # until the run waits for it, if it does
            cursor.execute("SELECT pg_sleep(0.2)")
            connection.commit()

    def watch(statement: str) -> Verdict:
        if statement.startswith(SNAPSHOT):
            has_lock = threading.Event()
            threading.Thread(target=rewrite, args=[has_lock]).start()
            has_lock.wait(10)
        return None

    with proxy(server, watch) as between:
        yield between.to(database)
    assert rewrites > 1


@pytest.mark.slow
def test_a_backfill_misses_no_row_of_a_table_that_is_rewritten(server: embedded.Server, table: Database) -> None:
    v = checksum(table)
    with rewritten(server, table) as between:
        alembic(between, "upgrade", "head")

    assert stamp(table) == [HEAD]
    assert mismatches(table) == []
    assert checksum(table) == v


@pytest.mark.slow
def test_values_without_source_outlive_a_rewrite(server: embedded.Server, table: Database) -> None:
    table.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector({DIM})")
    own = "[1,2,3,4,5,6,7,8]"
    table.run(
        f"INSERT INTO {TABLE} SELECT gen_random_uuid(), 'own', 'u', NULL, {DIM}, %s FROM generate_series(1, 20)", own
    )
    alembic(table, "upgrade", EXPAND)

    with rewritten(server, table) as between:
        alembic(between, "upgrade", "head")

    assert table.value(f"SELECT count(*) FROM {TABLE} WHERE v IS NULL AND v_vector::text = %s", own) == 20
    assert column_type(table, "v_vector_adopted") is None
    assert len(mismatches(table)) == 20


@pytest.mark.slow
def test_a_native_table_keeps_its_vectors_through_a_rewrite(server: embedded.Server, database: Database) -> None:
    create_newer(database, ROWS)
    with rewritten(server, database) as between:
        for command in (("upgrade", "head"), ("downgrade", "base")):
            alembic(between, *command)
            assert wrong(database, ROWS) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["swap", "drop"])
def test_a_cutover_and_its_undo_lose_nothing_to_a_rewrite(server: embedded.Server, table: Database, mode: str) -> None:
    v = checksum(table)
    alembic(table, "upgrade", "head")
    with rewritten(server, table) as between:
        for command in ("upgrade", "downgrade"):
            target = "head" if command == "upgrade" else "base"
            alembic(between, *CUTOVER, command, target, env={"OM_CUTOVER": mode})

    assert checksum(table) == v
    assert mismatches(table) == []


@pytest.mark.slow
def test_a_downgrade_counts_what_it_would_lose_in_a_snapshot_of_its_own(table: Database) -> None:
    """And not in Alembic's, which may be older: it waits for a lock in a transaction that has looked already."""
    alembic(table, "upgrade", EXPAND)
    table.run(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = %L',"
        " current_database(), 'repeatable read'); END $$"
    )
    with closing(table.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(f"INSERT INTO {TABLE} VALUES (gen_random_uuid(), 'own', 'u', NULL, {DIM})")
        cursor.execute(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]' WHERE v IS NULL")
        cursor.execute(f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE")
        results = []
        thread = threading.Thread(target=lambda: results.append(alembic(table, "downgrade", "base", check=False)))
        thread.start()
        eventually(lambda: table.rows("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        connection.commit()
        thread.join()

    assert results[0].returncode != 0, results[0].log
    assert "1 values of" in results[0].log
    assert table.value(f"SELECT count(*) FROM {TABLE} WHERE v IS NULL AND v_vector IS NOT NULL") == 1
