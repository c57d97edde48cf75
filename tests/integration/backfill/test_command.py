"""`openmemory-migrations backfill`: any number of them at one table, before the revision and beside it."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Mapping

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.backfill import progress
from openmemory_migrations.db.database import Database as PackageDatabase
from tests.support.cases import exhaustive
from tests.support.commands import NOTHING, Process, Result, alembic, om, result, start_om
from tests.support.engines import by_each, only_client
from tests.support.interruption import kill
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, pack, random_rows
from tests.support.package import run_backfill
from tests.support.sessions import converted, eventually, sessions, terminate
from tests.support.states import BACKFILL, EXPAND, HEAD, indexes, stamp
from tests.support.writers import remembered, v_of, writing

__all__ = ["by_each"]

ROWS, DIM = 6_000, 64
SLOWLY = {"BACKFILL_BATCH": "50", "OM_BACKFILL_PAUSE_MS": "20"}  # 120 batches, more than 2 seconds for one


def start(database: Database | None, *args: str, env: Mapping[str, str] = NOTHING) -> Process:
    return start_om(database, "backfill", *args, env=env)


def backfill(database: Database | None, *args: str, env: Mapping[str, str] = NOTHING) -> Result:
    return om(database, "backfill", *args, env=env)


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(ROWS, DIM))
    alembic(database, "upgrade", EXPAND)
    return database


def test_before_the_revision_which_then_finds_nothing_to_do(table: Database) -> None:
    v = checksum(table)

    done = backfill(table)

    assert (done.returncode, done.stdout) == (0, "")
    assert f"backfill {TABLE}: {ROWS:,} of {ROWS:,} rows (100 %)" in done.stderr
    assert stamp(table) == [EXPAND]
    assert mismatches(table) == []
    versions = table.rows(f"SELECT ctid, xmin FROM {TABLE} ORDER BY 1")

    log = alembic(table, "upgrade", "head").stderr

    assert f"backfill {TABLE}: 0 of 0 rows (100 %)" in log
    assert table.rows(f"SELECT ctid, xmin FROM {TABLE} ORDER BY 1") == versions
    assert checksum(table) == v
    assert stamp(table) == [HEAD]
    assert indexes(table)


@pytest.mark.slow
def test_settings_are_those_of_the_chain(table: Database) -> None:
    done = backfill(table, "-x", "backfill_engine=server", "-x", "backfill_workers=2", env={"BACKFILL_BATCH": "700"})

    assert done.returncode == 0
    assert mismatches(table) == []
    assert converted(table) == ROWS


@pytest.mark.slow
def test_columns_of_a_host(database: Database) -> None:
    create_table(database)
    load(database, random_rows(100, 8))
    database.run(f'ALTER TABLE {TABLE} RENAME v TO "raw bytes"; CREATE EXTENSION vector')
    database.run(f"ALTER TABLE {TABLE} ADD embedding vector(8)")
    database.run(f"COMMENT ON COLUMN {TABLE}.embedding IS 'openmemory_migrations: kept equal to raw bytes'")

    done = backfill(database, "--column", "raw bytes", "--vector-column", "embedding", env={"OM_SYNC_TRIGGER": "off"})

    assert done.returncode == 0, done.stderr
    assert database.value(f"SELECT count(embedding) FROM {TABLE}") == 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "env", "code", "said"),
    [
        ((), {"OM_DATABASE_URL": ""}, 2, "no database is configured"),
        ((), {"OM_DATABASE_URL": "postgresql://nobody@/nothing?host=/nowhere"}, 3, "nowhere"),
        (("-x", "batch=5"), {}, 2, 'unknown setting "batch" after -x'),
        (("-x", "backfill_batch"), {}, 2, '-x "backfill_batch" is not NAME=VALUE'),
        (("-x", "backfill_batch=0"), {}, 2, "BACKFILL_BATCH must be a whole number"),
        (("--column", "nothing"), {}, 1, 'has no column "nothing"'),
        ((), {"OM_VECTOR_TABLE": "elsewhere"}, 1, 'table "public.elsewhere" does not exist'),
        ((), {"OM_METADATA_BACKEND": "sqlite", "OM_DATABASE_URL": ""}, 0, "nothing to do"),
        ((), {"OM_DATABASE_URL": "sqlite:///nothing.db"}, 2, "SQLite keeps vectors as bytes"),
        ((), {"OM_VEC_DIM": "65"}, 1, "has 64 dimensions, but 65 are configured"),
    ],
)
def test_what_can_not_be_meant(
    table: Database, args: tuple[str, ...], env: Mapping[str, str], code: int, said: str
) -> None:
    done = backfill(table, *args, env=env)

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert converted(table) == 0


def test_before_there_is_a_column_the_step_that_adds_it_is_named(database: Database) -> None:
    create_table(database)
    load(database, random_rows(10, 8))

    done = backfill(database)

    assert done.returncode == 1
    assert 'has no column "v_vector" of this package yet' in done.stderr
    assert "alembic upgrade om_20240107_pgvector" in done.stderr


def test_v_that_is_a_vector_already_is_nothing_to_do(database: Database) -> None:
    database.run(f"CREATE EXTENSION vector; CREATE TABLE {TABLE} (id uuid, sector text, v vector(3), dim integer)")

    done = backfill(database)

    assert done.returncode == 0
    assert "is of type vector already" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "code"), [("skip", 0), ("fail", 1)])
def test_rows_that_can_not_be_converted(table: Database, policy: str, code: int) -> None:
    table.run(f"UPDATE {TABLE} SET v = %s WHERE user_id = 'user1'", pack([float("nan")] * DIM))

    done = backfill(table, env={"OM_ON_BAD_ROWS": policy})

    assert done.returncode == code
    assert f'{ROWS // 20:,} rows of "public.{TABLE}" can\'t be converted and were skipped' in done.stderr
    assert converted(table) == ROWS - ROWS // 20


@pytest.mark.slow
def test_rows_that_come_without_a_trigger_are_not_fine(database: Database) -> None:
    create_table(database)
    load(database, random_rows(ROWS, DIM))
    alembic(database, "upgrade", EXPAND, env={"OM_SYNC_TRIGGER": "off"})
    more = random_rows(50, DIM, seed=1)
    process = start(database, env={**SLOWLY, "OM_SYNC_TRIGGER": "off"})
    over = threading.Event()

    def write() -> None:
        while not over.wait(0.01):
            database.run(f"UPDATE {TABLE} SET v = %s, v_vector = NULL WHERE id = %s", more[0].v, first)

    first = database.value(f"SELECT id FROM {TABLE} LIMIT 1")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        done = result(process)
    finally:
        over.set()
        writer.join()

    assert done.returncode in (0, 1)
    assert (done.returncode == 1) == ("were written during the backfill and have no vector" in done.stderr)


@pytest.mark.slow
def test_what_was_set_aside_is_left_to_the_revision(database: Database) -> None:
    create_table(database)
    load(database, random_rows(200, 8))
    database.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector(8)")
    database.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]', v = NULL WHERE user_id = 'user1'")
    alembic(database, "upgrade", EXPAND)

    done = backfill(database)

    assert done.returncode == 0
    assert '"v_vector_adopted" of "public.openmemory_vectors" is kept until the revision has run' in done.stderr
    assert converted(database) == 190

    alembic(database, "upgrade", "head")

    assert converted(database) == 200
    assert not database.value("SELECT count(*) FROM pg_attribute WHERE attname = 'v_vector_adopted'")


@pytest.mark.slow
def test_stopped_by_a_signal_and_continued(table: Database) -> None:
    process = start(table, env=SLOWLY)
    eventually(lambda: converted(table) > ROWS / 5)
    process.send_signal(signal.SIGTERM)
    stopped = result(process)
    before = converted(table)

    assert stopped.returncode == 3
    assert "stopped by SIGTERM; what is committed is kept" in stopped.stderr
    assert before < ROWS

    assert backfill(table).returncode == 0
    assert mismatches(table) == []
    assert converted(table) == ROWS


@pytest.mark.slow
def test_a_lost_connection_is_made_anew(table: Database) -> None:
    process = start(table, env=SLOWLY)
    eventually(lambda: converted(table) > ROWS / 5)
    assert terminate(table)
    done = result(process)

    assert done.returncode == 0
    assert "Connecting again in 1 s" in done.stderr
    assert converted(table) == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["client", "server"])
def test_the_line_of_one_shows_what_all_have_done(
    table: Database, engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.1)
    caplog.set_level("INFO")
    others = [start(table, env={**SLOWLY, "OM_BACKFILL_ENGINE": engine}) for _ in range(3)]
    eventually(lambda: sessions(table, extra="AND application_name LIKE '%backfill%'") > 0)

    run_backfill(table, PackageDatabase, backfill_batch=50, backfill_pause_ms=20, backfill_engine=engine)

    assert [result(other).returncode for other in others] == [0, 0, 0]
    assert mismatches(table) == []
    found = re.findall(
        rf"backfill {TABLE}: ([\d,]+) of ([\d,]+) rows \((\d+) %\).*; ([\d,]+) of them by this", caplog.text
    )
    numbers = [[int(text.replace(",", "")) for text in line] for line in found]
    done, total, percent, own = max(numbers, key=lambda line: (line[1], line[0]))
    assert total > ROWS / 2, "it came too late to see anything"
    # inside the server nothing is claimed in a rest, so the others may not be done when this one has gone over all
    assert (done, percent) == (total, 100) or engine == "server"
    assert 0 < own < 0.7 * total
    assert [line[0] for line in numbers if line[1] == total] == sorted(line[0] for line in numbers if line[1] == total)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [exhaustive("client"), "server"])
def test_four_of_which_one_is_killed_while_the_application_writes(database: Database, engine: str) -> None:
    create_table(database)
    data = random_rows(20_000, DIM)
    load(database, data)
    alembic(database, "upgrade", EXPAND)
    env = {"BACKFILL_BATCH": "100", "OM_BACKFILL_PAUSE_MS": "10", "OM_BACKFILL_ENGINE": engine}

    with writing(database, data) as writers:
        processes = [start(database, env=env) for _ in range(4)]
        eventually(lambda: converted(database) > len(data) / 4)
        kill(processes[0])
        assert converted(database) < len(data)
        found = [result(process) for process in processes[1:]]
        log = alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)}).stderr

    assert [done.returncode for done in found] == [0, 0, 0], "\n".join(done.stderr for done in found)
    # the application's bad rows look like pending ones
    left = re.findall(rf"backfill {TABLE}: ([\d,]+) of [\d,]+ rows", log)
    assert max(map(int, left)) < 20, log
    assert mismatches(database, dim=DIM) == []
    assert v_of(database) == remembered(writers)
    assert stamp(database) == [HEAD]


@pytest.mark.slow
@only_client
def test_beside_the_revision_which_waits_for_it_before_the_index(table: Database) -> None:
    alone = start(table, env=SLOWLY)
    eventually(lambda: converted(table) > 0)

    log = alembic(table, "upgrade", "head", env={"BACKFILL_BATCH": "50"}).stderr
    done = result(alone)

    assert done.returncode == 0
    assert "another run is at work on a part of the table" in log
    assert mismatches(table) == []
    assert converted(table) == ROWS
    assert stamp(table) == [HEAD]
    assert indexes(table)


@pytest.mark.slow
def test_the_revision_waits_to_take_the_column_away(table: Database) -> None:
    alone = start(table, env=SLOWLY)
    eventually(lambda: converted(table) > 0)

    log = alembic(table, "downgrade", "base").stderr

    assert f'waiting for another run on "public.{TABLE}"' in log
    assert result(alone).returncode == 0
    assert stamp(table) == []
    assert BACKFILL not in log
