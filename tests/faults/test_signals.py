"""SIGINT and SIGTERM, wherever the run is: whole batches stay, nothing of it is left on the server, a re-run goes on.

The helpers at the top watch a command while it works; the other files on what happens online share them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from signal import Signals

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.db import locks
from tests.support.commands import Process, alembic, result, start_alembic
from tests.support.engines import FILLS, by_each
from tests.support.openmemory import Database, Row, checksum, mismatches, random_rows
from tests.support.proxy import Verdict, proxy
from tests.support.running import (
    OURS,
    REACTION,
    SIGNALS,
    assert_stopped,
    engine_of,
    expanded,
    filled,
    lock_row,
    nothing_left,
    running,
    slow_rows,
    transaction,
    waiting,
)
from tests.support.sessions import converted, eventually
from tests.support.states import (
    BACKFILL,
    HEAD,
    INDEX,
    guards,
    indexes,
    snapshot,
    stamp,
    without_extension,
    without_guards,
)

__all__ = ["by_each"]


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


def test_a_run_that_is_told_to_stop_does_not_connect_again(server: embedded.Server, database: Database) -> None:
    """The connection is lost before a cancel has come to the server."""
    filled(database, random_rows(500, 16))
    process: Process | None = None

    def watch(statement: str) -> Verdict:
        if not statement.lstrip().startswith(("CREATE TEMPORARY TABLE", *FILLS)):
            return None
        assert process
        process.send_signal(SIGNALS[0])
        time.sleep(0.2)
        return "before"

    with proxy(server, watch) as between:
        process = start_alembic(between.to(database), "upgrade", "head")
        ended = result(process)
    assert "stopped by" in ended.log
    assert "Connecting again" not in ended.log


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_does_not_wait_for_a_rest_to_end(database: Database, number: Signals) -> None:
    filled(database, random_rows(500, 16))

    with running(database, "upgrade", "head", env={"BACKFILL_BATCH": "100", "OM_BACKFILL_PAUSE_MS": "60000"}) as run:
        run.says("is in place")
        eventually(lambda: converted(database))
        assert_stopped(run, number, database)

    done = converted(database)
    assert 0 < done <= 100
    assert len(mismatches(database)) == 500 - done


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
            database, "upgrade", "head", env={"OM_LOCK_TIMEOUT_MS": "20"}, patch="tries.FIRST_PAUSE = 100.0"
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

    # but for what could not go while somebody read the table
    assert without_guards(snapshot(database)) == before
    alembic(database, "downgrade", "base")
    assert stamp(database) == []
    assert guards(database) == []


@pytest.mark.exhaustive
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
