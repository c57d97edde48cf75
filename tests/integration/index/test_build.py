"""The index build: it waits with patience, shows what for, takes the memory it needs, and leaves nothing half done."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
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
from tests.support.commands import NOTHING, alembic, om, result, start_alembic
from tests.support.index_builds import BUILDING, READER, SNAPSHOT, build_waits, leave_invalid
from tests.support.openmemory import Database, Row, create_database, drop_database, mismatches, random_rows, real_rows
from tests.support.preflight import check, finding
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
        running(backfilled, "upgrade", "head", patch="build_progress.LOG_INTERVAL = 0.05") as run,
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
        database, "upgrade", "head", env={"OM_INDEX": "hnsw"}, patch="build_progress.LOG_INTERVAL = 0.02"
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
    small = {"shared_buffers": "1MB", "maintenance_work_mem": "1MB", "effective_cache_size": "1MB"}
    with embedded.temporary(bin=programs(), options=OPTIONS | small) as server:
        database = create_database(server, "small")
        filled(database, random_rows(2500, 64))

        done = alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw"})
        assert re.search(
            r"WARNING:  the graph of the index needs about \d MB, and its build gets 1 MB of memory", done.stderr
        )
        assert NO_LONGER_FITS in done.stderr
        found = re.search(r"HINT:  If the server can spare it: OM_INDEX_MEMORY=(\d+MB),", done.stderr)
        assert found

        alembic(database, "downgrade", BACKFILL)
        again = alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw", "OM_INDEX_MEMORY": found[1]})
        assert "the graph of the index needs" not in again.stderr
        assert NO_LONGER_FITS not in again.stderr


@pytest.mark.parametrize("lists", [NOTHING, {"OM_INDEX_LISTS": "900"}], ids=["by rows", "configured"])
def test_with_too_little_memory_ivfflat_has_as_many_lists_as_fit(database: Database, lists: dict[str, str]) -> None:
    filled(database, random_rows(45_000 if not lists else 1000, 8))

    done = alembic(database, "upgrade", "head", env={**lists, "OM_INDEX_MEMORY": "3MB"})

    wanted = "45" if not lists else "900"
    found = re.search(
        rf"WARNING:  the index has (\d+) lists and not {wanted}: its build gets 3 MB of memory, and those"
        r" need (\d+) MB\n"
        r"HINT:  If the server can spare it: OM_INDEX_MEMORY=(\d+MB), or behind a pooler ALTER ROLE CURRENT_USER SET"
        r" maintenance_work_mem = '\d+MB', then: openmemory-migrations index --rebuild\.",
        done.stderr,
    )
    assert found
    assert 1 < int(found[1]) < int(wanted)
    assert stamp(database) == [HEAD]
    assert indexes(database)[INDEX][1] is True
    (options,) = database.rows(f"SELECT reloptions[1] FROM pg_class WHERE relname = '{INDEX}'")[0]
    assert options == f"lists={found[1]}"
    assert om(database, "status", env=lists).returncode == 0
    assert "lists and not" not in alembic(database, "upgrade", "head", env={**lists, "OM_INDEX_MEMORY": "3MB"}).stderr
    again = om(database, "index", "--rebuild", env={**lists, "OM_INDEX_MEMORY": found[3]})
    assert "lists and not" not in again.stderr
    assert database.value(f"SELECT reloptions[1] FROM pg_class WHERE relname = '{INDEX}'") == f"lists={wanted}"

    # whoever has less memory now leaves it as it is
    for memory in ("3MB", "1MB"):
        kept = om(database, "index", env={**lists, "OM_INDEX_MEMORY": memory})
        assert (kept.returncode, "exists already and is as wanted" in kept.stderr) == (0, True)
    assert database.value(f"SELECT reloptions[1] FROM pg_class WHERE relname = '{INDEX}'") == f"lists={wanted}"


def test_with_too_little_memory_for_one_list_there_is_none_and_status_says_so(database: Database) -> None:
    filled(database, random_rows(1000, 64))
    little = {"OM_INDEX_MEMORY": "1MB"}

    done = alembic(database, "upgrade", "head", env=little)

    assert re.search(
        "WARNING:  no index on .* ivfflat needs 4 MB of memory even for one list, and gets 1 MB", done.stderr
    )
    assert stamp(database) == [HEAD]
    assert indexes(database) == {}
    assert mismatches(database) == []
    told = om(database, "status", env=little)
    assert told.returncode == 1
    assert "next:        openmemory-migrations index" in told.stdout


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
        pytest.param(f"{TABLE} (user_id)", "taken by a btree index on user_id", id="other method"),
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
    often = "build_progress.LOG_INTERVAL = 0.05"

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
          IF nextval('public.drops') = 1 THEN
            RAISE EXCEPTION 'tuple concurrently updated' USING ERRCODE = 'XX000';
          END IF;
        END $$;
        CREATE EVENT TRIGGER once ON ddl_command_start WHEN TAG IN ('DROP INDEX') EXECUTE FUNCTION once()
        """
    )

    log = alembic(backfilled, "upgrade", "head").stderr

    assert "can't be dropped: tuple concurrently updated (SQLSTATE XX000), again in" in log
    assert_indexed(backfilled)


# -- what no index can be built of


BIG = struct.pack("<f", 70_000.0)


def with_a_big_value(row: Row) -> Row:
    assert row.v
    return row._replace(v=BIG + row.v[4:])


@pytest.mark.parametrize(("dim", "env"), [(2100, {}), (8, {"OM_INDEX_HALFVEC": "on", "OM_INDEX": "hnsw"})])
def test_a_value_that_halfvec_can_not_hold_keeps_the_index_away_and_nothing_else(
    database: Database, dim: int, env: dict[str, str]
) -> None:
    rows = random_rows(60, dim)
    # 65,519 becomes 65,504 as a half, and infinite bytes are no vector
    edge = rows[1]._replace(v=struct.pack("<f", 65_519.0) + (rows[1].v or b"")[4:])
    filled(database, [with_a_big_value(rows[0]), edge, *rows[2:]])
    told = finding(check(database, 0, env=env), "no-index")
    assert told["message"] == "no index: 1 rows hold values beyond ±65,504, which halfvec can't hold"
    assert rows[0].id in told["detail"]

    for _ in range(2):
        log = alembic(database, "upgrade", "head", env=env).stderr
        assert re.search(r"WARNING:  no index on the cast of .* to halfvec: 1 rows hold values beyond ±65,504", log)
        assert f"DETAIL:  Such as (id={rows[0].id}" in log
        assert stamp(database) == [HEAD]
        assert indexes(database) == {}
        assert mismatches(database, dim=dim) == []
        alembic(database, "downgrade", BACKFILL)
    alembic(database, "upgrade", "head", env=env)
    assert om(database, "status", env=env).returncode == 1
    assert om(database, "index", env=env).returncode == 1

    database.run(f"DELETE FROM {TABLE} WHERE id = %s", rows[0].id)
    assert om(database, "index", env=env).returncode == 0
    assert om(database, "status", env=env).returncode == 0


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_ivfflat_in_one_dimension_is_refused_before_it_is_built(database: Database, metric: str) -> None:
    filled(database, random_rows(60, 1))
    env = {"OM_INDEX_METRIC": metric}

    log = alembic(database, "upgrade", "head", env=env).stderr

    assert f"ivfflat by {metric} needs two dimensions or more" in log
    assert stamp(database) == [HEAD]
    told = om(database, "status", env=env)
    assert told.returncode == 1
    assert "OM_INDEX=hnsw" in told.stdout
    assert om(database, "index", env=env | {"OM_INDEX": "hnsw"}).returncode == 0


def test_whatever_create_index_answers_is_a_warning(database: Database) -> None:
    """Here an event trigger; nothing is left of the build, and it isn't said to have been interrupted."""
    filled(database, random_rows(60, 8))
    alembic(database, "upgrade", BACKFILL)
    database.run(
        "CREATE FUNCTION deny() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no index today'; END $$;"
        "CREATE EVENT TRIGGER deny ON ddl_command_start WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION deny()"
    )

    log = alembic(database, "upgrade", "head").stderr

    assert re.search("WARNING:  index .* can't be built: no index today", log)
    assert "interrupted" not in log
    assert stamp(database) == [HEAD]
    told = om(database, "status")
    assert told.returncode == 1
    assert "next:        openmemory-migrations index" in told.stdout
    database.run("DROP EVENT TRIGGER deny")
    assert om(database, "index").returncode == 0
    assert om(database, "status").returncode == 0


@pytest.mark.slow
def test_with_little_shared_memory_it_is_built_without_parallel_workers() -> None:
    """As in a container: the server has memory, and little of it can be shared."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("no right to mount a /dev/shm of its own")
    program = """
import os, subprocess
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", "/dev/shm"], check=True)
os.environ["TMPDIR"] = "/var/tmp"
from openmemory_migrations import embedded
from tests.support.commands import alembic, om
from tests.support.openmemory import create_database, create_table, load, random_rows
from tests.support.servers import programs
options = {"fsync": "off", "min_parallel_table_scan_size": "0", "dynamic_shared_memory_type": "posix"}
with embedded.temporary(bin=programs(), options=options) as server:
    database = create_database(server, "small")
    create_table(database)
    load(database, random_rows(30000, 256))
    log = alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw", "OM_INDEX_MEMORY": "200MB"}).stderr
    assert "building it again without parallel workers" in log, log
    assert "is built and valid" in log, log
    assert om(database, "status", env={"OM_INDEX": "hnsw"}).returncode == 0
"""
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.exhaustive  # some three minutes, and 6 GB of disk
@pytest.mark.timeout(1800)
def test_a_million_rows_on_a_server_at_its_defaults_end_with_their_index() -> None:
    with embedded.temporary(bin=programs()) as server:
        database = create_database(server, "million")
        filled(database, real_rows(256))
        several = f"SELECT CAST(1 + 1000000 / count(*) AS integer) FROM {TABLE}"
        byte = "set_byte(set_byte(v, 4 * (n % 250), n % 251), 4 * (n / 250 % 250), n / 250 % 251)"
        database.run(
            f"INSERT INTO {TABLE} SELECT gen_random_uuid(), sector, user_id, {byte}, dim"
            f" FROM {TABLE}, generate_series(1, ({several})) AS n"
        )
        assert database.value("SHOW maintenance_work_mem") == "64MB"

        done = result(start_alembic(database, "upgrade", "head"), timeout=1500)

        assert done.returncode == 0, done.log
        assert "WARNING" not in done.stderr
        assert database.value(f"SELECT reloptions[1] FROM pg_class WHERE relname = '{INDEX}'") == "lists=1000"
        assert om(database, "status").returncode == 0
