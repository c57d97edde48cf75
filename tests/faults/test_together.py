"""Runs beside each other: one works, the others wait for it by name, and whoever dies is no obstacle."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.db import locks
from tests.support.commands import alembic
from tests.support.openmemory import Database, checksum, mismatches, random_rows
from tests.support.running import OURS, Run, engine_of, expanded, filled, lock_row, running, transaction, waiting
from tests.support.sessions import converted, eventually
from tests.support.states import BACKFILL, EXPAND, HEAD, INDEX, IVFFLAT, indexes, snapshot, stamp, without_extension

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

WAITING = "waiting for another run on the chain"
SNAPSHOT = ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT FROM pg_class LIMIT 1"]
PATIENT = {"OM_LOCK_TIMEOUT_MS": "60000"}


def lock_holders(database: Database) -> set[int]:
    """Return the processes of runs that hold the lock of the chain or of the table."""
    rows = database.rows(
        "SELECT pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE locktype = 'advisory' AND granted AND datname = current_database()"
    )
    return {pid for (pid,) in rows}


def assert_waits_for(run: Run, holders: set[int]) -> None:
    found = run.says(WAITING + r' .*\nDETAIL:  Held by process (\d+) \("openmemory-migrations", connected since \d\d:')
    assert int(found[1]) in holders


def building(database: Database) -> int:
    """Wait for an index build that waits for a transaction, and return its process."""
    waits = f"SELECT pid FROM pg_stat_activity WHERE {OURS} AND query ~ '^CREATE INDEX' AND wait_event_type = 'Lock'"
    return int(eventually(lambda: database.rows(waits))[0][0])


def for_seconds(database: Database, pid: int, seconds: float) -> None:
    """Wait until that process has been in its present state, or at its present statement, for so long."""
    age = "SELECT extract(epoch FROM clock_timestamp() - state_change) FROM pg_stat_activity WHERE pid = %s"
    eventually(lambda: database.value(age, pid) > seconds)


def assert_migrated(database: Database, v: str) -> None:
    assert stamp(database) == [HEAD]
    assert mismatches(database) == []
    assert checksum(database) == v
    assert indexes(database) == {INDEX: (IVFFLAT, True)}


@pytest.mark.parametrize("number", [2, 3])
def test_of_upgrades_started_together_one_converts_and_all_end_well(database: Database, number: int) -> None:
    v = expanded(database, random_rows(300, 8))

    with ExitStack() as stack:
        other = stack.enter_context(transaction(database, lock_row(150)))
        runs = [stack.enter_context(running(database, "upgrade", "head", env=PATIENT)) for _ in range(number)]
        eventually(lambda: waiting(database))
        holders = lock_holders(database)
        eventually(lambda: sum(WAITING in run.log for run in runs) == number - 1)
        for run in runs:
            if WAITING in run.log:
                assert_waits_for(run, holders)
        other.rollback()
        assert [run.ends() for run in runs] == [0] * number

    assert sum("300 of 300 rows (100 %)" in run.log for run in runs) == 1
    assert sum("is built and valid" in run.log for run in runs) == 1
    assert_migrated(database, v)


def test_upgrades_from_nothing_at_the_same_moment_all_end_well(database: Database) -> None:
    v = filled(database, random_rows(900, 32))

    with ExitStack() as stack:
        runs = [stack.enter_context(running(database, "upgrade", "head")) for _ in range(3)]
        assert [run.ends() for run in runs] == [0, 0, 0], [run.log for run in runs]

    assert sum("is in place" in run.log for run in runs) == 1
    assert_migrated(database, v)


def test_a_downgrade_waits_for_the_upgrade_and_takes_all_of_it_away(database: Database) -> None:
    v = filled(database, random_rows(300, 8))
    before = without_extension(snapshot(database))
    alembic(database, "upgrade", EXPAND)

    with (
        transaction(database, lock_row(150)) as other,
        running(database, "upgrade", "head", env=PATIENT) as upgrade,
    ):
        eventually(lambda: waiting(database))
        with running(database, "downgrade", "base") as downgrade:
            assert_waits_for(downgrade, lock_holders(database))
            other.rollback()
            assert (upgrade.ends(), downgrade.ends()) == (0, 0), upgrade.log + downgrade.log

    assert "is built and valid" in upgrade.log
    assert without_extension(snapshot(database)) == before
    assert stamp(database) == []
    assert checksum(database) == v


def test_an_upgrade_waits_for_the_downgrade_and_begins_anew(database: Database) -> None:
    v = filled(database, random_rows(300, 8))
    alembic(database, "upgrade", BACKFILL)

    with (
        transaction(database, f"LOCK TABLE {TABLE} IN ACCESS SHARE MODE") as other,
        running(database, "downgrade", "base", env=PATIENT) as downgrade,
    ):
        eventually(lambda: waiting(database))
        with running(database, "upgrade", "head") as upgrade:
            assert_waits_for(upgrade, lock_holders(database))
            other.rollback()
            assert (upgrade.ends(), downgrade.ends()) == (0, 0), upgrade.log + downgrade.log

    assert "300 of 300 rows (100 %)" in upgrade.log
    assert_migrated(database, v)


@pytest.mark.parametrize("start", ["base", "head"])
def test_upgrade_and_downgrade_at_the_same_moment_end_in_the_state_of_one_of_them(
    database: Database, start: str
) -> None:
    v = filled(database, random_rows(900, 8))
    before = without_extension(snapshot(database))
    if start == "head":
        alembic(database, "upgrade", "head")

    with running(database, "upgrade", "head") as upgrade, running(database, "downgrade", "base") as downgrade:
        assert (upgrade.ends(), downgrade.ends()) == (0, 0), upgrade.log + downgrade.log

    if stamp(database):
        assert_migrated(database, v)
    else:
        assert without_extension(snapshot(database)) == before


def test_a_killed_run_frees_the_others_which_finish_its_work(database: Database) -> None:
    v = expanded(database, random_rows(300, 8))
    small = {"BACKFILL_BATCH": "100"}

    with ExitStack() as stack:
        other = stack.enter_context(transaction(database, lock_row(150)))
        first = stack.enter_context(running(database, "upgrade", "head", env=small))
        eventually(lambda: converted(database) >= 100)
        holders = lock_holders(database)
        rest = [stack.enter_context(running(database, "upgrade", "head", env=small)) for _ in range(2)]
        for run in rest:
            assert_waits_for(run, holders)
        first.kill()
        eventually(lambda: lock_holders(database) - holders)
        other.rollback()
        assert [run.ends() for run in rest] == [0, 0]

    assert sum("is built and valid" in run.log for run in rest) == 1
    assert_migrated(database, v)


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(SNAPSHOT, id="at its end, by an old snapshot"),
        pytest.param([f"UPDATE {TABLE} SET user_id = 'x'"], id="at its beginning, by a writer"),
    ],
)
def test_a_run_killed_in_its_index_build_frees_the_others_which_finish_its_work(
    database: Database, held: list[str]
) -> None:
    v = filled(database, random_rows(300, 8))
    alembic(database, "upgrade", BACKFILL)

    with transaction(database, *held) as other, running(database, "upgrade", "head") as first:
        builder = building(database)
        with running(database, "upgrade", "head") as second:
            assert_waits_for(second, lock_holders(database))
            first.kill()
            # nothing tells its server process, still at the index, of the client's death
            second.says("Running upgrade")
            for_seconds(database, builder, 2)
            other.rollback()
            assert second.ends() == 0, second.log

    assert not database.rows("SELECT FROM pg_stat_activity WHERE pid = %s", builder)
    assert_migrated(database, v)


def test_a_run_that_waits_is_no_obstacle_to_the_index_build(database: Database) -> None:
    v = filled(database, random_rows(300, 8))
    alembic(database, "upgrade", BACKFILL)

    with transaction(database, *SNAPSHOT) as other, running(database, "upgrade", "head") as first:
        builder = building(database)
        with running(database, "upgrade", "head") as second:
            assert_waits_for(second, lock_holders(database))
            # longer than deadlock_timeout, and several looks of the one that waits
            for_seconds(database, builder, 2.5)
            other.rollback()
            assert (first.ends(), second.ends()) == (0, 0), first.log + second.log

    assert "is built and valid" in first.log
    assert_migrated(database, v)


@pytest.mark.parametrize(
    ("done", "lock"),
    [
        pytest.param(None, locks.shared, id="expand waits for a backfill"),
        pytest.param(EXPAND, locks.exclusive, id="backfill waits for an expand"),
        pytest.param(BACKFILL, locks.shared, id="finalize waits for a backfill"),
    ],
)
def test_a_step_waits_for_another_chain_on_the_same_table(
    database: Database, done: str | None, lock: Callable[..., AbstractContextManager[None]]
) -> None:
    v = filled(database, random_rows(300, 8))
    if done:
        alembic(database, "upgrade", done)
    before = stamp(database)

    with ExitStack() as held:
        held.enter_context(lock(engine_of(database, "the host"), "-", "table", "public", TABLE))
        (holder,) = lock_holders(database)
        with running(database, "upgrade", "head") as run:
            run.says(
                f'waiting for another run on "public.{TABLE}"\n'
                rf'DETAIL:  Held by process {holder} \("the host", connected since \d\d:'
            )
            assert (stamp(database) or None) == before
            held.close()
            assert run.ends() == 0, run.log

    assert_migrated(database, v)


def test_a_backfill_goes_on_beside_the_backfill_of_another_chain(database: Database) -> None:
    expanded(database, random_rows(300, 8))

    with locks.shared(engine_of(database, "the host"), "-", "table", "public", TABLE):
        done = alembic(database, "upgrade", BACKFILL)

    assert "waiting" not in done.stderr
    assert mismatches(database) == []


# what the server may end a session for while it waits, and the first version that knows it
SESSION_TIMEOUTS = [
    pytest.param("idle_in_transaction_session_timeout", 14, id="idle_in_transaction_session_timeout"),
    pytest.param("transaction_timeout", 17, id="transaction_timeout"),
    pytest.param("idle_session_timeout", 14, id="idle_session_timeout", marks=pytest.mark.slow),
]


def session_timeout(database: Database, name: str, since: int) -> None:
    if int(database.value("SHOW server_version_num")) < since * 10_000:
        pytest.skip(f"{name} came with PostgreSQL {since}")
    database.run(f"ALTER DATABASE {database.name} SET {name} = '1s'")


@pytest.mark.parametrize(("name", "since"), SESSION_TIMEOUTS)
def test_a_session_timeout_of_the_role_does_not_take_the_locks_away(database: Database, name: str, since: int) -> None:
    v = filled(database, random_rows(300, 8))
    session_timeout(database, name, since)

    # a rest that is shorter than the timeout, and six of them
    slowly = {"BACKFILL_BATCH": "50", "OM_BACKFILL_PAUSE_MS": "500"}
    with running(database, "upgrade", "head", env=slowly) as run:
        run.says("is in place")
        eventually(lambda: converted(database) >= 50)
        holders = lock_holders(database)
        eventually(lambda: converted(database) >= 250)
        # the chain's and the table's; what reads ahead may have come to its end
        assert len(holders & lock_holders(database)) >= 2
        assert run.ends() == 0, run.log

    assert "lost" not in run.log
    assert_migrated(database, v)


@pytest.mark.parametrize(("name", "since"), SESSION_TIMEOUTS)
def test_a_session_timeout_of_the_role_does_not_end_a_run_that_waits(database: Database, name: str, since: int) -> None:
    v = filled(database, random_rows(300, 8))
    session_timeout(database, name, since)

    with ExitStack() as held:
        held.enter_context(locks.exclusive(engine_of(database, "the host"), "-", "table", "public", TABLE))
        host = lock_holders(database)
        with running(database, "upgrade", "head") as run:
            run.says(f'waiting for another run on "public.{TABLE}"')
            (chain,) = lock_holders(database) - host
            for_seconds(database, chain, 2.5)
            held.close()
            assert run.ends() == 0, run.log

    assert "lost" not in run.log
    assert_migrated(database, v)


@pytest.mark.slow
def test_upgrades_and_downgrades_at_any_moment_end_well(
    database: Database, record_property: Callable[[str, object], None]
) -> None:
    v = filled(database, random_rows(900, 32))
    before = without_extension(snapshot(database))
    seed = random.randrange(2**32)
    record_property("seed", seed)
    moments = random.Random(seed)

    for _ in range(8):
        with ExitStack() as stack:
            runs = []
            for _ in range(4):
                command = moments.choice([["upgrade", "head"], ["downgrade", "base"], ["upgrade", BACKFILL]])
                runs.append(stack.enter_context(running(database, *command)))
                time.sleep(moments.uniform(0, 0.4))
            killed = moments.choice(runs)
            killed.kill()
            for run in runs:
                assert run is killed or run.ends() == 0, (seed, run.log)

    alembic(database, "upgrade", "head")
    assert_migrated(database, v)
    alembic(database, "downgrade", "base")
    assert without_extension(snapshot(database)) == before
