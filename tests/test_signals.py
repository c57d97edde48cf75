"""SIGINT and SIGTERM, wherever the run is: whole batches stay, nothing of it is left on the server, a re-run goes on.

The helpers at the top watch a command while it works; the other files on what happens online share them.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from signal import Signals
from typing import IO, TypeVar

import psycopg2
import pytest
from psycopg2.extensions import connection as Connection
from sqlalchemy.engine import Engine

from demo.openmemory import TABLE, environment
from openmemory_migrations import locks
from openmemory_migrations.connecting import engine_for
from openmemory_migrations.settings import Settings

from .helpers import (
    NOTHING,
    ROOT,
    Database,
    Row,
    alembic,
    checksum,
    create_table,
    load,
    mismatches,
    random_rows,
    start_alembic,
)
from .states import BACKFILL, EXPAND, HEAD, INDEX, indexes, snapshot, stamp, without_extension

T = TypeVar("T")
SIGNALS = [Signals.SIGINT, Signals.SIGTERM]
REACTION = 10.0  # seconds; what it must not be is the rest or the wait that the signal falls into
# the run's sessions by their names, without that of the test
OURS = "datname = current_database() AND application_name LIKE 'openmemory-migrations%%'"


def eventually(condition: Callable[[], T], timeout: float = 30, every: float = 0.02) -> T:
    """Return what `condition` gives as soon as that is true."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {timeout} s"
        time.sleep(every)
    return found


class Run:
    """An alembic command at work, and its log so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log = ""
        # Alembic writes its FAILED line to stdout
        self._readers = [threading.Thread(target=self._read, args=[pipe]) for pipe in (process.stdout, process.stderr)]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.log += line

    def says(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """Wait for it and return the match."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.log)):
            assert self.process.poll() is None, f"ended without saying {pattern}\n{self.log}"
            assert time.monotonic() < end, f"not said within {timeout} s: {pattern}\n{self.log}"
            time.sleep(0.02)
        return found

    def ends(self, timeout: float = 60) -> int:
        """Wait for the end and return the exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s\n{self.log}")
        for reader in self._readers:
            reader.join()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.ends()


@contextmanager
def running(
    database: Database, *args: str, env: Mapping[str, str] = NOTHING, patch: str | None = None
) -> Iterator[Run]:
    """Run the command in the background; `patch` is Python that changes a constant of the package's modules first."""
    with start_alembic(database, *args, env=env) if patch is None else _patched(database, args, env, patch) as process:
        run = Run(process)
        try:
            yield run
        finally:
            run.kill()


def _patched(database: Database, args: tuple[str, ...], env: Mapping[str, str], patch: str) -> subprocess.Popen[str]:
    program = (
        f"from openmemory_migrations import building_progress, locks, pace\n{patch}\nfrom alembic.config import main\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program + f"main({list(args)})"],
        cwd=ROOT,
        env=environment(database, env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def transaction(database: Database, *statements: str, name: str = "nightly report") -> Iterator[Connection]:
    """Somebody else's session, with a transaction open until its `rollback()`."""
    connection = psycopg2.connect(database.url, application_name=name)
    try:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
        yield connection
    finally:
        connection.close()


def engine_of(database: Database, name: str) -> Engine:
    """Return what the package connects with, as an application of this name."""
    url = Settings.load({"database_url": f"{database.url}&application_name={name}"}, {}).database_url
    assert url
    return engine_for(url)


def filled(database: Database, rows: list[Row]) -> str:
    create_table(database)
    load(database, rows)
    return checksum(database)


def expanded(database: Database, rows: list[Row]) -> str:
    """Leave the backfill as the next step: a lock on a row keeps the one before it from its lock on the table."""
    v = filled(database, rows)
    alembic(database, "upgrade", EXPAND)
    return v


def lock_row(position: int) -> str:
    """SQL that locks the row at this place in physical order, the order of the backfill."""
    place = f"SELECT ctid FROM {TABLE} ORDER BY ctid OFFSET {position} LIMIT 1"
    return f"SELECT FROM {TABLE} WHERE ctid = ({place}) FOR UPDATE"


def converted(database: Database) -> int:
    return int(database.value(f"SELECT count(v_vector) FROM {TABLE}"))


def waiting(database: Database) -> list[int]:
    """Processes of the run that wait for a lock."""
    rows = database.rows(f"SELECT pid FROM pg_stat_activity WHERE {OURS} AND wait_event_type = 'Lock'")
    return [pid for (pid,) in rows]


def nothing_left(database: Database) -> bool:
    return not database.rows(f"SELECT FROM pg_stat_activity WHERE {OURS}")


def slow_rows(database: Database, seconds: float) -> None:
    """Have each row take its time in an UPDATE of any column but v, so that a batch can be met in its middle."""
    database.run(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        f" 'BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END'"
    )
    database.run(f"CREATE TRIGGER slow BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION slow()")


def assert_stopped(run: Run, number: Signals, database: Database) -> None:
    sent = time.monotonic()
    run.process.send_signal(number)
    # a negative code is a process that died of the signal, and could say nothing
    assert run.ends(3 * REACTION) > 0, run.log
    assert time.monotonic() - sent < REACTION
    eventually(lambda: nothing_left(database), 2)
    assert f"FAILED: stopped by {number.name}; what is committed is kept" in run.log
    assert "HINT:  Run the same command again to continue." in run.log
    assert "Traceback" not in run.log


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_a_batch_takes_that_batch_back_and_the_same_command_continues(
    database: Database, number: Signals
) -> None:
    v = filled(database, random_rows(500, 16))
    slow_rows(database, 0.005)
    sleeping = f"SELECT FROM pg_stat_activity WHERE {OURS} AND wait_event = 'PgSleep'"

    with running(database, "upgrade", "head", env={"BACKFILL_BATCH": "50"}) as run:
        run.says("is in place")
        eventually(lambda: converted(database) >= 100 and database.rows(sleeping))
        assert_stopped(run, number, database)

    done = converted(database)
    assert 100 <= done < 500
    assert done % 50 == 0
    assert len(mismatches(database)) == 500 - done
    assert stamp(database) == ["om_20240107_pgvector"]

    database.run("DROP FUNCTION slow CASCADE")
    again = alembic(database, "upgrade", "head")
    assert f"{500 - done} of {500 - done} rows (100 %)" in again.stderr
    assert mismatches(database) == []
    assert checksum(database) == v


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_does_not_wait_for_a_rest_to_end(database: Database, number: Signals) -> None:
    filled(database, random_rows(500, 16))

    with running(database, "upgrade", "head", env={"BACKFILL_BATCH": "100", "OM_BACKFILL_PAUSE_MS": "60000"}) as run:
        run.says("is in place")
        eventually(lambda: converted(database) == 100)
        assert_stopped(run, number, database)

    assert converted(database) == 100
    assert len(mismatches(database)) == 400


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("prepare", "held"),
    [
        pytest.param(filled, f"LOCK TABLE {TABLE} IN ACCESS SHARE MODE", id="table"),
        pytest.param(expanded, lock_row(30), id="row"),
    ],
)
def test_a_signal_ends_the_wait_for_a_lock(
    database: Database, prepare: Callable[[Database, list[Row]], str], held: str, number: Signals
) -> None:
    v = prepare(database, random_rows(100, 16))

    with (
        transaction(database, held),
        running(database, "upgrade", "head", env={"OM_LOCK_TIMEOUT_MS": "60000"}) as run,
    ):
        eventually(lambda: waiting(database))
        assert_stopped(run, number, database)

    alembic(database, "upgrade", "head")
    assert mismatches(database) == []
    assert checksum(database) == v


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_pause_between_two_tries(database: Database, number: Signals) -> None:
    filled(database, random_rows(100, 16))
    before = without_extension(snapshot(database))

    with (
        transaction(database, f"LOCK TABLE {TABLE} IN ACCESS SHARE MODE"),
        running(
            database, "upgrade", "head", env={"OM_LOCK_TIMEOUT_MS": "20"}, patch="locks.FIRST_PAUSE = 100.0"
        ) as run,
    ):
        run.says(r"try 1 of 30, again in \d\d+\.\d s")
        assert_stopped(run, number, database)

    assert without_extension(snapshot(database)) == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_wait_for_another_run(database: Database, number: Signals) -> None:
    filled(database, random_rows(100, 16))
    before = snapshot(database)
    engine = engine_of(database, "another")

    with locks.exclusive(engine, "-", "chain", "public"), running(database, "upgrade", "head") as run:
        run.says("waiting for another run on the chain")
        assert_stopped(run, number, database)

    assert snapshot(database) == before
    alembic(database, "upgrade", "head")
    assert mismatches(database) == []


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_wait_for_another_run_on_the_table(database: Database, number: Signals) -> None:
    filled(database, random_rows(100, 16))
    before = snapshot(database)
    engine = engine_of(database, "another")

    with locks.shared(engine, "-", "table", "public", TABLE), running(database, "upgrade", "head") as run:
        run.says(f'waiting for another run on "public.{TABLE}"')
        assert_stopped(run, number, database)

    assert snapshot(database) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_a_downgrade_takes_nothing_away_by_halves(database: Database, number: Signals) -> None:
    filled(database, random_rows(100, 16))
    alembic(database, "upgrade", BACKFILL)
    before = snapshot(database)

    with (
        transaction(database, f"LOCK TABLE {TABLE} IN ACCESS SHARE MODE"),
        running(database, "downgrade", "base", env={"OM_LOCK_TIMEOUT_MS": "60000"}) as run,
    ):
        eventually(lambda: waiting(database))
        assert_stopped(run, number, database)

    assert snapshot(database) == before
    alembic(database, "downgrade", "base")
    assert stamp(database) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signals_at_any_moment_lose_nothing(
    database: Database, number: Signals, record_property: Callable[..., None]
) -> None:
    v = filled(database, random_rows(1500, 64))
    seed = random.randrange(2**32)
    record_property("seed", seed)
    moments = random.Random(seed)
    codes = []

    for _ in range(15):
        env = {"BACKFILL_BATCH": "100", "OM_INDEX": moments.choice(["ivfflat", "hnsw"])}
        with running(database, "upgrade", "head", env=env) as run:
            # before the first line Python itself is still on its way up, and no signal is anybody's
            run.says("Context impl")
            time.sleep(moments.uniform(0, 0.8))
            run.process.send_signal(number)
            codes.append(run.ends(3 * REACTION))
        eventually(lambda: nothing_left(database), 2)
        assert all(valid for _, valid in indexes(database).values()), seed
        if codes[-1] == 0:
            assert stamp(database) == [HEAD], seed
            alembic(database, "downgrade", "base")

    assert len(set(codes)) > 1, (seed, codes)
    alembic(database, "upgrade", "head")
    assert mismatches(database) == []
    assert checksum(database) == v
    assert indexes(database)[INDEX][1]
