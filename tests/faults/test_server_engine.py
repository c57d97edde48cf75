"""The server engine and what ends it, stands in its way or writes meanwhile; behind a pooler and on every driver."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import CursorResult

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.sql import Fragment
from tests.support.cases import exhaustive
from tests.support.commands import alembic, result, start_alembic
from tests.support.engines import FILLS
from tests.support.host_styles import create
from tests.support.interruption import (
    DIM,
    ROWS,
    SLOWLY,
    TO_HEAD,
    Ends,
    done,
    end,
    ends,
    filled,
    in_the_middle,
    kill,
    life_cycle,
    reported,
    table,
    wait_until_gone,
)
from tests.support.openmemory import (
    Database,
    checksum,
    create_database,
    create_table,
    load,
    mismatches,
    pack,
    random_rows,
)
from tests.support.package import run_backfill
from tests.support.pooler import PROGRAM, assert_migrated, assert_nothing_stays, bouncer
from tests.support.running import expanded, running, session, slow_rows, transaction, waiting
from tests.support.server_engine import SERVER
from tests.support.servers import OPTIONS, programs
from tests.support.sessions import converted, eventually, sessions, terminate
from tests.support.states import EXPAND, HEAD, follows, stamp
from tests.support.writers import remembered, v_of, writing, written

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

__all__ = ["ends", "table"]  # fixtures

SLOW = {**SERVER, **SLOWLY}
OTHERS = [("generic", "psycopg"), ("async", "psycopg_async")]


def more_than(table: Database, rows: float) -> bool:
    return converted(table) > rows


@pytest.mark.parametrize("engine", ["server", "native"])
def test_killed_at_random_points_it_carries_on_and_converts_nothing_twice(
    table: Database, ends: Ends, engine: str
) -> None:
    v = checksum(table)
    before: set[tuple[str, ...]] = set()
    for share in sorted(random.uniform(0.05, 0.8) for _ in range(3)):
        process = start_alembic(table, "upgrade", "head", env={**SLOWLY, "OM_BACKFILL_ENGINE": engine})
        eventually(partial(more_than, table, share * ROWS))
        kill(process)
        wait_until_gone(table)
        assert before <= done(table), "a row was converted twice"
        before = done(table)
    assert 0 < len(before) < ROWS

    again = alembic(table, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine})

    assert reported(again.log) == ROWS - len(before)
    assert before <= done(table), "a row was converted twice"
    assert mismatches(table) == []
    assert checksum(table) == v
    assert end(table) == ends[TO_HEAD]
    life_cycle(table, ends)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["client", "server"])
def test_either_engine_carries_on_where_the_other_was_killed(table: Database, ends: Ends, engine: str) -> None:
    process = start_alembic(table, "upgrade", "head", env={**SLOWLY, "OM_BACKFILL_ENGINE": engine})
    eventually(lambda: in_the_middle(table))
    kill(process)
    wait_until_gone(table)
    before = done(table)

    alembic(table, "upgrade", "head", env={"OM_BACKFILL_ENGINE": "client" if engine == "server" else "server"})

    assert before <= done(table)
    assert end(table) == ends[TO_HEAD]


@pytest.mark.parametrize("workers", ["1", exhaustive("3")])
def test_sessions_terminated_in_the_middle(table: Database, ends: Ends, workers: str) -> None:
    process = start_alembic(table, "upgrade", "head", env=SLOW | {"OM_BACKFILL_WORKERS": workers})
    eventually(lambda: in_the_middle(table))
    before = done(table)
    assert terminate(table)

    ended = result(process)

    assert ended.returncode == 0, ended.log
    assert before <= done(table), "a row was converted twice"
    assert end(table) == ends[TO_HEAD]


@pytest.mark.slow
def test_the_server_crashes_in_the_middle(ends: Ends) -> None:
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        table = filled(create_database(server, "crash"))
        process = start_alembic(table, "upgrade", "head", env=SLOW)
        eventually(lambda: in_the_middle(table))
        server.stop("immediate")
        server.start()

        ended = result(process)

        assert ended.returncode == 0, ended.log
        assert 0.2 * ROWS < reported(ended.log) < 0.8 * ROWS
        assert end(table) == ends[TO_HEAD]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_takes_back_the_page_and_the_same_command_continues(table: Database, number: signal.Signals) -> None:
    with running(table, "upgrade", "head", env=SLOW) as run:
        eventually(lambda: in_the_middle(table))
        run.process.send_signal(number)
        assert run.ends(10) not in (0, -number), run.log
    assert "Traceback" not in run.log, run.log
    wait_until_gone(table)
    before = done(table)
    assert 0 < len(before) < ROWS

    alembic(table, "upgrade", "head", env=SERVER)

    assert before <= done(table)
    assert mismatches(table) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"BACKFILL_BATCH": "100"},
        {"BACKFILL_BATCH": "20", "OM_BACKFILL_WORKERS": "3"},
    ],
    ids=["one", "three"],
)
def test_up_down_and_up_again_while_the_application_writes(database: Database, env: Mapping[str, str]) -> None:
    create_table(database)
    data = random_rows(3_000, DIM)
    load(database, data)
    env = {**SERVER, "OM_VEC_DIM": str(DIM), "OM_INDEX": "none", **env}

    with writing(database, data) as writers:
        for command in [("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")]:
            before = written(writers)
            alembic(database, *command, env=env)
            assert written(writers) - before > 100

    assert stamp(database) == [HEAD]
    assert mismatches(database, dim=DIM) == []
    assert v_of(database) == remembered(writers)
    assert follows(database, DIM)


def test_rows_that_others_hold_are_waited_for_when_all_others_are_done(database: Database) -> None:
    v = expanded(database, random_rows(300, DIM))
    nan = pack([float("nan")] * DIM)
    keys = f"SELECT id, sector FROM {TABLE} ORDER BY 1, 2 OFFSET 90 LIMIT 3"
    held = f"UPDATE {TABLE} SET v = %s WHERE (id, sector) IN ({keys})"

    with (
        transaction(database) as other,
        running(database, "upgrade", "head", env=SERVER | {"BACKFILL_BATCH": "80", "OM_LOCK_TIMEOUT_MS": "50"}) as run,
    ):
        with other.cursor() as cursor:
            cursor.execute(held, (nan,))
        run.says("rows are locked, another pass in")
        assert converted(database) == 297
        other.rollback()
        assert run.ends() == 0, run.log

    assert mismatches(database) == []
    assert converted(database) == 300
    assert checksum(database) == v


def test_what_others_commit_while_a_page_waits_for_their_rows_is_what_counts(database: Database) -> None:
    """Good bytes, NaN and a wrong length come between the page's snapshot and its lock; without a trigger to help."""
    create_table(database)
    data = sorted(random_rows(120, DIM))
    load(database, data)
    alembic(database, "upgrade", EXPAND, env={"OM_SYNC_TRIGGER": "off"})
    new = [random_rows(1, DIM, seed=5)[0].v, pack([float("inf")] * DIM), b"\1\2\3", None]

    with (
        transaction(database) as other,
        running(
            database, "upgrade", "head", env=SERVER | {"OM_SYNC_TRIGGER": "off", "OM_LOCK_TIMEOUT_MS": "60000"}
        ) as run,
        other.cursor() as cursor,
    ):
        for row, v in zip(data[50:], new, strict=False):
            cursor.execute(f"UPDATE {TABLE} SET v = %s WHERE id = %s", (v, row.id))
        eventually(lambda: waiting(database))
        other.commit()
        assert run.ends() == 0, run.log

    assert mismatches(database) == []
    assert converted(database) == 117


class Beginning(PackageDatabase):
    """The package's connections; `before` is called before the first page is converted."""

    before: Any
    begun: list[bool]

    def run(
        self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: Fragment
    ) -> CursorResult[Any]:
        if template.lstrip().startswith(FILLS) and not self.begun:
            self.begun.append(True)
            self.before()
        return super().run(template, parameters, **names)


# after deadlock_timeout, a second, the page has looked for a deadlock, and then the application looks
@pytest.mark.slow
@pytest.mark.parametrize(("lock_timeout_ms", "think"), [(500, 0), (5_000, 1.2)])
def test_a_transaction_of_the_application_is_never_the_victim_of_a_deadlock(
    database: Database, lock_timeout_ms: int, think: float
) -> None:
    """It has the last row of the page, then wants the first, which the page has by then."""
    data = sorted(random_rows(100, DIM))
    expanded(database, data)
    locked = threading.Event()
    errors: list[BaseException] = []
    write = f"UPDATE {TABLE} SET v = v WHERE id = %s"

    def work() -> None:
        try:
            with session(database) as other, other.cursor() as cursor:
                cursor.execute(write, (data[-1].id,))
                locked.set()
                eventually(lambda: sessions(database, extra="AND wait_event_type = 'Lock'"))
                time.sleep(think)
                cursor.execute(write, (data[0].id,))
                other.commit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)

    def before() -> None:
        thread.start()
        assert locked.wait(10)

    make = type("Begun", (Beginning,), {"before": staticmethod(before), "begun": []})
    run_backfill(database, make, backfill_engine="server", lock_timeout_ms=lock_timeout_ms)
    thread.join()

    assert errors == []
    assert mismatches(database) == []
    assert converted(database) == 100


def test_a_statement_timeout_of_the_role_makes_pages_smaller_until_they_fit(database: Database) -> None:
    expanded(database, random_rows(120, DIM))
    slow_rows(database, 0.01)
    database.run(f"ALTER DATABASE {database.name} SET statement_timeout = '450ms'")

    log = alembic(database, "upgrade", "head", env=SERVER | {"BACKFILL_BATCH": "100"}).stderr

    assert "statement timeout" in log
    assert re.search(r"try 1 of 30, again with [\d,]+ rows", log)
    database.run(f"ALTER DATABASE {database.name} RESET statement_timeout")
    assert mismatches(database) == []
    assert converted(database) == 120


@pytest.mark.slow
def test_a_statement_timeout_of_the_role_does_not_keep_it_from_going_on_far_into_the_table(database: Database) -> None:
    """What is to be passed over, to come to where the last run was ended, is no part of the first page."""
    create_table(database)
    database.run(
        f"INSERT INTO {TABLE} SELECT lpad(to_hex(i), 32, '0')::uuid, 's', NULL, '\\x0000803f', 1"
        " FROM generate_series(1, 600000) AS i"
    )
    alembic(database, "upgrade", EXPAND, env={"OM_VEC_DIM": "1"})
    database.run(f"UPDATE {TABLE} SET v_vector = '[1]' WHERE id < lpad(to_hex(599900), 32, '0')::uuid")
    database.run(f"VACUUM {TABLE}")
    database.run(f"ALTER DATABASE {database.name} SET statement_timeout = '20ms'")

    alembic(database, "upgrade", "head", env=SERVER | {"BACKFILL_BATCH": "10", "OM_INDEX": "none"}, timeout=250)

    database.run(f"ALTER DATABASE {database.name} RESET statement_timeout")
    assert converted(database) == 600_000


@pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer on PATH or in /usr/sbin")
@pytest.mark.parametrize("workers", ["1", pytest.param("3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["server", "native"])
def test_through_pgbouncer_in_transaction_mode(
    server: embedded.Server, database: Database, workers: str, engine: str
) -> None:
    v = expanded(database, random_rows(900, 16))
    env = {"OM_BACKFILL_ENGINE": engine} | {"BACKFILL_BATCH": "50", "OM_BACKFILL_WORKERS": workers}

    with bouncer(server, database) as through:
        processes = assert_nothing_stays(database, through)
        log = alembic(through, "upgrade", "head", env=env).stderr

        assert "900 of 900 rows (100 %)" in log
        assert_migrated(database, v)
        assert assert_nothing_stays(database, through) == processes


@pytest.mark.parametrize(
    ("style", "driver"), [("async", "asyncpg"), *(pytest.param(*both, marks=pytest.mark.slow) for both in OTHERS)]
)
@pytest.mark.parametrize("engine", ["server", "native"])
def test_in_a_host_on_each_driver(style: str, driver: str, engine: str, database: Database, tmp_path: Path) -> None:
    host = create(tmp_path / "host", style, database, driver, settings={"OM_VEC_DIM": "64", "BACKFILL_BATCH": "100"})
    host.alembic("upgrade", "host_2")
    load(
        database, [*random_rows(500, 64), *(row._replace(v=pack([float("nan")] * 64)) for row in random_rows(3, 64, 1))]
    )
    v = checksum(database)

    log = host.alembic("upgrade", "head", env={"OM_BACKFILL_ENGINE": engine, "OM_BACKFILL_WORKERS": "2"}).log

    assert "3 rows of" in log
    assert mismatches(database, dim=64) == []
    assert checksum(database) == v
    commits = database.rows(f"SELECT count(*) FROM {TABLE} WHERE v_vector IS NOT NULL GROUP BY xmin")
    assert max(rows for (rows,) in commits) <= 200  # by pages, which hold more or less
    host.alembic("downgrade", "host_2", env=SERVER)
    assert checksum(database) == v
