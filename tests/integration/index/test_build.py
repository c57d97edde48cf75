"""The index build: it waits with patience, shows what for, takes the memory it needs, and leaves nothing half done."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from signal import Signals

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.engine import Connection

from demo.openmemory import TABLE
from openmemory_migrations import embedded, ops
from openmemory_migrations.errors import MigrationError
from tests.support.commands import alembic
from tests.support.index_builds import BUILDING, READER, SNAPSHOT, build_waits, leave_invalid
from tests.support.openmemory import Database, create_database, drop_database, mismatches, random_rows
from tests.support.running import SIGNALS, assert_stopped, engine_of, filled, running, transaction
from tests.support.servers import OPTIONS, programs
from tests.support.sessions import eventually
from tests.support.states import BACKFILL, HEAD, INDEX, INVALIDATE, IVFFLAT, indexes, stamp

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

NO_LONGER_FITS = "hnsw graph no longer fits into maintenance_work_mem"


@pytest.fixture
def backfilled(database: Database) -> Database:
    """All is done but the index."""
    filled(database, random_rows(300, 8))
    alembic(database, "upgrade", BACKFILL)
    return database


def assert_indexed(database: Database) -> None:
    assert stamp(database) == [HEAD]
    assert indexes(database) == {INDEX: (IVFFLAT, True)}


@contextmanager
def step(connection: Connection) -> Iterator[None]:
    """Have the functions of ops work in this process, on a connection that can be looked at afterwards."""
    with Operations.context(MigrationContext.configure(connection)), connection.begin():
        yield


def settings(connection: Connection) -> list[str]:
    names = ("lock_timeout", "statement_timeout", "maintenance_work_mem")
    values = [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]
    connection.rollback()
    return values


def test_a_long_transaction_is_named_and_waited_for_whatever_timeouts_the_role_has(backfilled: Database) -> None:
    for setting in ("lock_timeout = '200ms'", "statement_timeout = '1s'"):
        backfilled.run(f"ALTER ROLE postgres IN DATABASE {backfilled.name} SET {setting}")
    old = "SELECT clock_timestamp() - xact_start > interval '1.1 s' FROM pg_stat_activity WHERE pid = %s"

    with transaction(backfilled, *SNAPSHOT) as other:
        pid = other.info.backend_pid
        eventually(lambda: backfilled.value(old, pid))
        with running(backfilled, "upgrade", "head") as run:
            run.says(
                f'index "{INDEX}": has to wait until transactions that are open now are over\n'
                rf'DETAIL:  process {pid} \("nightly report", role postgres, open since \d\d:\d\d:\d\d'
            )
            # longer than both timeouts
            eventually(lambda: build_waits(backfilled, 1.5))
            other.rollback()
            assert run.ends() == 0, run.log

    assert_indexed(backfilled)


def test_without_a_long_transaction_nothing_is_said_of_one(backfilled: Database) -> None:
    assert "has to wait" not in alembic(backfilled, "upgrade", "head").stderr


def test_the_settings_of_the_session_are_as_before_after_the_build_and_after_the_drop(backfilled: Database) -> None:
    for setting in ("lock_timeout = '200ms'", "statement_timeout = '10s'", "maintenance_work_mem = '5MB'"):
        backfilled.run(f"ALTER DATABASE {backfilled.name} SET {setting}")

    with engine_of(backfilled, "in-process").connect() as connection:
        with step(connection):
            ops.upgrade_finalize(index_memory="32MB")
        assert indexes(backfilled) == {INDEX: (IVFFLAT, True)}
        assert settings(connection) == ["200ms", "10s", "5MB"]
        with step(connection):
            ops.downgrade_finalize()
        assert indexes(backfilled) == {}
        assert settings(connection) == ["200ms", "10s", "5MB"]


def test_a_build_that_is_cancelled_fails_and_leaves_settings_and_no_index(backfilled: Database) -> None:
    backfilled.run(f"ALTER DATABASE {backfilled.name} SET statement_timeout = '10s'")
    cancel = f"SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE {BUILDING}"
    cancel = cancel.replace("openmemory-migrations", "in-process")

    with (
        transaction(backfilled, *SNAPSHOT),
        engine_of(backfilled, "in-process").connect() as connection,
        ThreadPoolExecutor() as pool,
    ):
        pool.submit(eventually, lambda: backfilled.rows(cancel))
        with (
            pytest.raises(MigrationError, match=f'index "{INDEX}" on .* can\'t be built: canceling statement due to'),
            step(connection),
        ):
            ops.upgrade_finalize()
        assert settings(connection)[:2] == ["0", "10s"]

    assert indexes(backfilled) == {}
    alembic(backfilled, "upgrade", "head")
    assert_indexed(backfilled)


def test_the_log_shows_whom_the_build_waits_for(backfilled: Database) -> None:
    with (
        transaction(backfilled, *SNAPSHOT) as other,
        running(backfilled, "upgrade", "head", patch="building_progress.LOG_INTERVAL = 0.05") as run,
    ):
        run.says(
            rf'NOTICE:  index "{INDEX}": waiting for old snapshots, \d+ %, waiting for process {other.info.backend_pid}'
        )
        other.rollback()
        assert run.ends() == 0, run.log


def test_the_log_shows_how_far_the_build_is(database: Database) -> None:
    filled(database, random_rows(3000, 64))
    alembic(database, "upgrade", BACKFILL)

    with running(
        database, "upgrade", "head", env={"OM_INDEX": "hnsw"}, patch="building_progress.LOG_INTERVAL = 0.02"
    ) as run:
        assert run.ends() == 0

    shares = re.findall(rf'NOTICE:  index "{INDEX}": building index: loading tuples, (\d+) %', run.log)
    assert len(set(shares)) > 1
    assert [int(share) for share in shares] == sorted(int(share) for share in shares)


def test_the_memory_that_is_configured_is_the_memory_of_the_build(database: Database) -> None:
    filled(database, random_rows(1500, 64))
    alembic(database, "upgrade", BACKFILL)

    # the server's own is 64 MB
    little = alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw", "OM_INDEX_MEMORY": "1MB"})
    assert NO_LONGER_FITS in little.stderr
    alembic(database, "downgrade", BACKFILL)

    database.run(f"ALTER DATABASE {database.name} SET maintenance_work_mem = '1MB'")
    enough = alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw", "OM_INDEX_MEMORY": "16MB"})
    assert NO_LONGER_FITS not in enough.stderr


@pytest.mark.parametrize(
    ("rows", "dim", "m"),
    [(1500, 64, 16), (600, 768, 16), pytest.param(600, 8, 60, marks=pytest.mark.slow)],
)
def test_the_memory_that_is_estimated_is_enough(database: Database, rows: int, dim: int, m: int) -> None:
    filled(database, random_rows(rows, dim))
    database.run(f"ALTER DATABASE {database.name} SET maintenance_work_mem = '1MB'")
    env = {"OM_INDEX": "hnsw", "OM_INDEX_M": str(m), "OM_INDEX_EF_CONSTRUCTION": str(2 * m)}

    done = alembic(database, "upgrade", "head", env=env)
    assert NO_LONGER_FITS not in done.stderr
    assert "of memory to build" not in done.stderr

    alembic(database, "downgrade", BACKFILL)
    assert NO_LONGER_FITS in alembic(database, "upgrade", "head", env=env | {"OM_INDEX_MEMORY": "1MB"}).stderr


@pytest.mark.server
@pytest.mark.slow
def test_memory_that_the_server_has_not_is_a_notice_whose_hint_is_enough() -> None:
    small = {"shared_buffers": "1MB", "maintenance_work_mem": "1MB"}
    with embedded.temporary(bin=programs(), options=OPTIONS | small) as server:
        database = create_database(server, "small")
        filled(database, random_rows(2500, 64))

        done = alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw"})
        assert re.search(r"NOTICE:  the index needs about \d MB of memory to build, and gets 1 MB", done.stderr)
        assert NO_LONGER_FITS in done.stderr
        found = re.search(r"HINT:  If the server can spare it: OM_INDEX_MEMORY=(\d+MB)\.", done.stderr)
        assert found

        alembic(database, "downgrade", BACKFILL)
        again = alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw", "OM_INDEX_MEMORY": found[1]})
        assert "of memory to build" not in again.stderr
        assert NO_LONGER_FITS not in again.stderr


def test_too_little_memory_for_ivfflat_is_a_notice_and_no_index(database: Database) -> None:
    filled(database, random_rows(1000, 8))

    done = alembic(database, "upgrade", "head", env={"OM_INDEX_LISTS": "900", "OM_INDEX_MEMORY": "1MB"})

    assert "memory required is" in done.stderr
    assert "HINT:  Set OM_INDEX_MEMORY to more" in done.stderr
    assert stamp(database) == [HEAD]
    assert indexes(database) == {}
    assert mismatches(database) == []


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_the_build_leaves_no_invalid_index_and_the_same_command_continues(
    backfilled: Database, number: Signals
) -> None:
    with transaction(backfilled, *SNAPSHOT), running(backfilled, "upgrade", "head") as run:
        eventually(lambda: build_waits(backfilled))
        assert indexes(backfilled)[INDEX][1] is False
        assert_stopped(run, number, backfilled)
        assert indexes(backfilled) == {}
        assert stamp(backfilled) == [BACKFILL]

    alembic(backfilled, "upgrade", "head")
    assert_indexed(backfilled)


def test_a_signal_in_the_build_is_heeded_beside_a_transaction_that_has_read_the_table(backfilled: Database) -> None:
    with transaction(backfilled, *READER) as other, running(backfilled, "upgrade", "head") as run:
        eventually(lambda: build_waits(backfilled))
        assert_stopped(run, Signals.SIGTERM, backfilled)
        other.rollback()

    alembic(backfilled, "upgrade", "head")
    assert_indexed(backfilled)


def test_an_invalid_index_of_an_interrupted_build_is_dropped_and_built_again(backfilled: Database) -> None:
    leave_invalid(backfilled, INDEX, f"{TABLE} USING ivfflat (v_vector vector_l2_ops) WITH (lists = 1)")

    done = alembic(backfilled, "upgrade", "head")

    assert f'index "{INDEX}" is invalid, left by a build that was interrupted; dropping it' in done.stderr
    assert_indexed(backfilled)


@pytest.mark.parametrize("valid", [True, False], ids=["valid", "invalid"])
@pytest.mark.parametrize(
    ("on", "said"),
    [
        pytest.param(
            "other USING ivfflat (w vector_l2_ops) WITH (lists = 1)",
            "taken by an index of another table",
            id="other table",
        ),
        pytest.param(f"{TABLE} (user_id)", "exists with another definition and is left as it is", id="other method"),
    ],
)
def test_an_index_of_somebody_else_under_the_name_is_reported_and_left(
    backfilled: Database, on: str, said: str, valid: bool
) -> None:
    backfilled.run("CREATE TABLE other AS SELECT v_vector AS w FROM openmemory_vectors")
    if valid:
        backfilled.run(f"CREATE INDEX {INDEX} ON {on}")
    else:
        leave_invalid(backfilled, INDEX, on)
    state = "SELECT indexrelid, pg_get_indexdef(indexrelid), indisvalid FROM pg_index WHERE indexrelid = %s::regclass"
    before = backfilled.rows(state, INDEX)

    done = alembic(backfilled, "upgrade", "head")

    assert re.search(rf'WARNING:  .*"{INDEX}".*{said}|WARNING:  .*{said}', done.stderr)
    assert backfilled.rows(state, INDEX) == before
    assert stamp(backfilled) == [HEAD]
    assert mismatches(backfilled) == []


def test_a_table_of_somebody_else_under_the_name_is_left(backfilled: Database) -> None:
    backfilled.run(f"CREATE TABLE {INDEX} AS SELECT 1 AS one")

    done = alembic(backfilled, "upgrade", "head")

    assert f'WARNING:  no index: the name "{INDEX}" is taken by something that is no index' in done.log
    assert backfilled.value(f"SELECT one FROM {INDEX}") == 1


def test_the_build_of_a_database_from_the_same_template_is_not_taken_for_ours(
    server: embedded.Server, backfilled: Database
) -> None:
    twin = Database(f"{backfilled.name}_twin", server.url(f"{backfilled.name}_twin"))
    backfilled.run(f"CREATE DATABASE {twin.name} TEMPLATE {backfilled.name}")
    often = "building_progress.LOG_INTERVAL = 0.05"

    try:
        with (
            transaction(backfilled, *SNAPSHOT) as one,
            transaction(twin, *SNAPSHOT) as other,
            running(backfilled, "upgrade", "head", patch=often) as first,
            running(twin, "upgrade", "head", patch=often) as second,
        ):
            eventually(lambda: build_waits(backfilled) and build_waits(twin))
            for run, pid in ((first, one.info.backend_pid), (second, other.info.backend_pid)):
                run.says(r"waiting for process \d+", 10)
                assert set(re.findall(r"waiting for process (\d+)", run.log)) == {str(pid)}
                assert "can't be shown" not in run.log
    finally:
        drop_database(server, twin.name)


def test_an_interrupted_build_that_ends_while_its_index_is_dropped_is_tried_again(backfilled: Database) -> None:
    """Both change the index's row in the catalog, and the server has an internal error for who comes second."""
    backfilled.run(f"CREATE INDEX {INDEX} ON {TABLE} USING ivfflat (v_vector vector_l2_ops) WITH (lists = 1)")
    backfilled.run(INVALIDATE)
    backfilled.run(
        """
        CREATE SEQUENCE drops;
        CREATE FUNCTION once() RETURNS event_trigger LANGUAGE plpgsql AS $$
        BEGIN
          IF nextval('drops') = 1 THEN
            RAISE EXCEPTION 'tuple concurrently updated' USING ERRCODE = 'XX000';
          END IF;
        END $$;
        CREATE EVENT TRIGGER once ON ddl_command_start WHEN TAG IN ('DROP INDEX') EXECUTE FUNCTION once()
        """
    )

    log = alembic(backfilled, "upgrade", "head").stderr

    assert "can't be dropped: tuple concurrently updated (SQLSTATE XX000), again in" in log
    assert_indexed(backfilled)
