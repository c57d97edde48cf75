"""Through a real PgBouncer in transaction mode: the chain ends as it does without, and its sessions stay clean."""

from __future__ import annotations

import threading

import psycopg2
import pytest

from openmemory_migrations import embedded
from tests.support.commands import alembic, om
from tests.support.openmemory import Database, checksum, mismatches, random_rows
from tests.support.pooler import CHANGED, POOL, PROGRAM, advisory_locks, assert_migrated, assert_nothing_stays, bouncer
from tests.support.running import expanded, filled, lock_row, running, transaction, waiting
from tests.support.sessions import converted, eventually
from tests.support.states import BACKFILL, INDEX, indexes, snapshot, stamp, without_extension

CONCURRENTLY = "CONCURRENTLY runs with the timeouts and memory of the role"

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer on PATH or in /usr/sbin")


class Watcher:
    """Another client of the pool, which looks at its session in each of its transactions; collects the unexpected."""

    def __init__(self, through: Database) -> None:
        self.unexpected: list[object] = []
        self.processes: set[int] = set()
        self.looks = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=[through])

    def _watch(self, through: Database) -> None:
        try:
            with transaction(through, name="watcher") as connection, connection.cursor() as cursor:
                while not self._over.wait(0.005):
                    cursor.execute(CHANGED)
                    self.unexpected += cursor.fetchall()
                    cursor.execute(
                        "SELECT pg_backend_pid(), current_setting('application_name'), current_setting('lock_timeout'),"
                        " current_setting('transaction_isolation'), pg_my_temp_schema() <> 0 AND EXISTS"
                        " (SELECT FROM pg_class WHERE relnamespace = pg_my_temp_schema())"
                    )
                    pid, *seen = cursor.fetchall()[0]
                    if seen != ["watcher", "0", "read committed", False]:
                        self.unexpected.append(seen)
                    connection.rollback()
                    self.processes.add(pid)
                    self.looks += 1
        except psycopg2.Error as error:
            self.unexpected.append(error)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize("pool", [POOL, 3])
def test_the_chain_goes_up_and_down_through_it_and_leaves_no_state(
    server: embedded.Server, database: Database, pool: int
) -> None:
    v = filled(database, random_rows(900, 16))
    before = without_extension(snapshot(database))

    with bouncer(server, database, pool) as through:
        processes = assert_nothing_stays(database, through, pool)
        up = alembic(through, "upgrade", "head", env={"BACKFILL_BATCH": "50"})
        assert CONCURRENTLY in up.stderr
        assert_migrated(database, v)
        assert assert_nothing_stays(database, through, pool) == processes

        down = alembic(through, "downgrade", "base")
        assert CONCURRENTLY in down.stderr
        assert without_extension(snapshot(database)) == before
        assert assert_nothing_stays(database, through, pool) == processes


@pytest.mark.slow
def test_another_client_of_the_pool_notices_nothing(server: embedded.Server, database: Database) -> None:
    v = filled(database, random_rows(900, 16))

    with bouncer(server, database) as through, Watcher(through) as watcher:
        alembic(through, "upgrade", "head", env={"BACKFILL_BATCH": "20"})
        alembic(through, "downgrade", "base")
        alembic(through, "upgrade", "head", env={"OM_INDEX": "hnsw", "OM_INDEX_MEMORY": "32MB"})

    assert watcher.unexpected == []
    assert watcher.looks > 20
    assert len(watcher.processes) > 1
    assert mismatches(database) == []
    assert checksum(database) == v


def test_without_it_nothing_is_said_of_a_pooler(database: Database) -> None:
    filled(database, random_rows(100, 16))

    assert "pooler" not in alembic(database, "upgrade", "head").stderr


@pytest.mark.parametrize("pool", [POOL, 3])
def test_two_upgrades_at_once_through_it_both_end_well(server: embedded.Server, database: Database, pool: int) -> None:
    v = expanded(database, random_rows(900, 16))

    with (
        bouncer(server, database, pool) as through,
        transaction(database, lock_row(450)) as other,
        running(through, "upgrade", "head", env={"OM_LOCK_TIMEOUT_MS": "60000"}) as first,
    ):
        eventually(lambda: waiting(database))
        with running(through, "upgrade", "head") as second:
            if pool == POOL:
                second.says(r"waiting for another run on the chain .*\nDETAIL:  Held by process \d+ ")
            other.rollback()
            assert (first.ends(), second.ends()) == (0, 0), first.log + second.log

        assert "900 of 900 rows (100 %)" in first.log
        assert_migrated(database, v)
        assert_nothing_stays(database, through, pool)


def test_a_killed_run_frees_its_locks_through_it(server: embedded.Server, database: Database) -> None:
    v = expanded(database, random_rows(900, 16))

    with bouncer(server, database) as through, transaction(database, lock_row(450)) as other:
        with running(through, "upgrade", "head", env={"BACKFILL_BATCH": "100"}) as run:
            eventually(lambda: converted(database) >= 100)
            assert len(advisory_locks(database)) >= 2
            run.kill()
        eventually(lambda: not advisory_locks(database), 10)
        other.rollback()

        alembic(through, "upgrade", "head")
        assert_migrated(database, v)
        assert_nothing_stays(database, through)


def test_a_short_lock_timeout_of_the_role_fails_the_index_build_and_leaves_no_invalid_index(
    server: embedded.Server, database: Database
) -> None:
    v = filled(database, random_rows(300, 16))
    alembic(database, "upgrade", BACKFILL)
    database.run(f"ALTER DATABASE {database.name} SET lock_timeout = '300ms'")
    snapshot_held = ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT FROM pg_class LIMIT 1"]

    with bouncer(server, database) as through:
        with transaction(database, *snapshot_held):
            done = alembic(through, "upgrade", "head", check=False)

            assert done.returncode > 0
            assert "lock timeout" in done.stdout
            role = f'ALTER ROLE "postgres" IN DATABASE "{database.name}"'
            assert f"HINT:  Connect directly, or: {role} SET lock_timeout = '1h'; Then" in done.stdout
            assert indexes(database) == {}
            assert stamp(database) == [BACKFILL]

        alembic(through, "upgrade", "head")
        assert_migrated(database, v)


@pytest.mark.slow
def test_another_index_takes_the_place_of_the_first_through_it(server: embedded.Server, database: Database) -> None:
    filled(database, random_rows(900, 16))

    with bouncer(server, database) as through:
        alembic(through, "upgrade", "head")
        done = om(through, "index", env={"OM_INDEX": "hnsw"})
        assert done.returncode == 0, done.log
        assert CONCURRENTLY in done.stderr
        ((name, (definition, valid)),) = indexes(database).items()
        assert (name, valid) == (INDEX, True)
        assert "USING hnsw" in definition
        assert_nothing_stays(database, through)
