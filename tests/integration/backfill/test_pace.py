"""The backfill's pace: rests with nothing open, and a halt as long as a replica is behind, away or out of sight."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from urllib.parse import quote

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from tests.support.commands import alembic, om
from tests.support.engines import by_each, only_client
from tests.support.openmemory import Database, mismatches, random_rows
from tests.support.preflight import check, finding
from tests.support.running import OURS, Run, expanded, filled, running
from tests.support.servers import replicated
from tests.support.sessions import converted, eventually
from tests.support.states import BACKFILL, EXPAND, HEAD, stamp

__all__ = ["by_each"]

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

# long enough for several looks at the replicas
SLOWLY = {"BACKFILL_BATCH": "50", "OM_BACKFILL_PAUSE_MS": "200", "OM_BACKFILL_MAX_LAG": "1"}


@dataclass(frozen=True)
class Look:
    """One look at the session that backfills."""

    at: float
    idle: bool
    converted: int


@contextmanager
def watching(database: Database) -> Iterator[list[Look]]:
    """Look at the run's session without a lock of the chain or the table, and at the table, all the while."""
    looks: list[Look] = []
    over = threading.Event()
    session = f"""
        SELECT state = 'idle' AND xact_start IS NULL, (SELECT count(v_vector) FROM {TABLE}) FROM pg_stat_activity a
        WHERE {OURS} AND NOT EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND locktype = 'advisory')
        """

    def watch() -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            while not over.wait(0.01):
                cursor.execute(session)
                looks.extend(Look(time.monotonic(), *row) for row in cursor)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield looks
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_ends_before_a_slot_keeps_too_much(database: Database, workers: str) -> None:
    slot = f"it's {database.name}".replace("'", "_").replace(" ", "_")
    expanded(database, random_rows(9000, 64))
    limit = {"OM_STOP_AT_SLOT_LAG": "4MB", "BACKFILL_BATCH": "50", "OM_BACKFILL_WORKERS": workers}
    database.run("CHECKPOINT")
    database.run("SELECT pg_create_physical_replication_slot(%s, true)", slot)
    kept = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) FROM pg_replication_slots"
    try:
        done = om(database, "backfill", env=limit)

        assert done.returncode == 3
        assert f'ERROR:  replication slot "{slot}" keeps' in done.log
        assert "OM_STOP_AT_SLOT_LAG is 4.2 MB" in done.log
        some = converted(database)
        assert 0 < some < 9000
        assert database.value(kept) < 4 * 1024**2
        assert om(database, "backfill", env=limit).returncode == 3
        told = finding(check(database, 1, env=limit), "slot-lag")
        assert told["message"].startswith(f'replication slot "{slot}" keeps')
        assert converted(database) == some
        database.run(told["hint"].partition(": ")[2])
    finally:
        database.run("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
    assert om(database, "backfill", env=limit).returncode == 0
    assert mismatches(database, dim=64) == []
    check(database, 0, env=limit)


def test_what_is_left_for_vacuum_is_said(database: Database) -> None:
    expanded(database, random_rows(300, 8))
    done = om(database, "backfill")
    assert "NOTICE:  backfill openmemory_vectors: 300 dead row versions are left\n" in done.log
    assert re.search(
        r"DETAIL:  Autovacuum takes them away once more than \d+ are dead; it looks every 1min.\n", done.log
    )
    assert "dead row versions" not in om(database, "backfill").log
    database.run(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = off); UPDATE {TABLE} SET v_vector = NULL")
    assert (
        "300 dead row versions are left\nDETAIL:  Autovacuum is off.\n"
        'HINT:  VACUUM (ANALYZE) "public"."openmemory_vectors";\n'
    ) in om(database, "backfill").log


def test_the_pause_is_a_rest_with_no_transaction_open(database: Database) -> None:
    expanded(database, random_rows(200, 8))

    with watching(database) as looks:
        alembic(database, "upgrade", BACKFILL, env={"BACKFILL_BATCH": "50", "OM_BACKFILL_PAUSE_MS": "800"})

    rests: dict[int, float] = {}  # the longest after each batch
    for (rows, idle), group in groupby(looks, lambda look: (look.converted, look.idle)):
        first, *_, last = [look.at for look in group] * 2
        if idle:
            rests[rows] = max(rests.get(rows, 0), last - first)
    batches = sorted(rests.keys() - {0})
    assert batches == [50, 100, 150, 200]
    assert batches[-1] == 200
    assert len(batches) >= 4
    assert all(rests[rows] > 0.4 for rows in batches[:-1])


def assert_held(run: Run, database: Database, reason: str) -> None:
    """Wait for the line that says so, then see that not one row is converted any more."""
    run.says(rf"NOTICE:  backfill {TABLE}: held, {reason}\nDETAIL:  OM_BACKFILL_MAX_LAG is 1 s\.")
    rows, until = converted(database), time.monotonic() + 1.5
    assert rows < database.value(f"SELECT count(v) FROM {TABLE}")
    while time.monotonic() < until:
        assert converted(database) == rows
    assert run.process.poll() is None


@pytest.mark.server
@pytest.mark.slow
def test_the_backfill_is_held_while_a_replica_lags_or_is_away() -> None:
    with replicated(1500) as pair, running(pair.database, "upgrade", BACKFILL, env=SLOWLY) as run:
        # several looks at a replica that keeps up
        eventually(lambda: converted(pair.database) >= 300)
        assert "MAX_LAG" not in run.log

        pair.on_replica("SELECT pg_wal_replay_pause()")
        assert_held(run, pair.database, r"a replica lags by [1-9]\d*\.\d s")
        pair.on_replica("SELECT pg_wal_replay_resume()")
        run.says(r"NOTICE: .* goes on, no replica lags by more than 1 s")

        pair.replica.stop()
        assert_held(run, pair.database, "1 of 1 replicas are not connected")
        pair.replica.start()
        assert run.ends() == 0, run.log

        assert len(re.findall("goes on", run.log)) == 2
        assert mismatches(pair.database) == []
        eventually(lambda: pair.on_replica(f"SELECT count(v_vector) FROM {TABLE}") == 1500)


def test_without_a_replica_it_runs_and_warns(database: Database) -> None:
    expanded(database, random_rows(250, 8))

    done = alembic(database, "upgrade", BACKFILL, env=SLOWLY)

    assert "WARNING:  OM_BACKFILL_MAX_LAG is set, but no replica is connected: nothing to wait for" in done.stderr
    assert mismatches(database) == []


@pytest.fixture
def owner(database: Database) -> Iterator[Database]:
    """The database as a plain role sees it that owns the table."""
    role = f'plain "{database.name}"'
    names = {"role": Identifier(role), "database": Identifier(database.name)}
    filled(database, random_rows(250, 8))
    database.run("CREATE EXTENSION vector")
    for sql in (
        "CREATE ROLE {role} LOGIN",
        "GRANT CREATE ON SCHEMA public TO {role}",
        f"ALTER TABLE {TABLE} OWNER TO {{role}}",
    ):
        database.run(SQL(sql).format(**names))
    yield Database(database.name, database.url.replace("postgresql://postgres@", f"postgresql://{quote(role)}@"))
    for sql in ("REASSIGN OWNED BY {role} TO postgres", "DROP OWNED BY {role}", "DROP ROLE {role}"):
        database.run(SQL(sql).format(**names))


@only_client
def test_without_the_right_to_see_the_lag_it_is_an_error_at_the_start(database: Database, owner: Database) -> None:
    refused = alembic(owner, "upgrade", "head", env=SLOWLY, check=False)

    assert refused.returncode > 0
    assert "FAILED: OM_BACKFILL_MAX_LAG is set, but this role may not see the lag of replicas" in refused.stdout
    assert stamp(database) == [EXPAND]
    assert converted(database) == 0

    hint = re.search(r"HINT:  (GRANT .*;)", refused.stdout)
    assert hint
    database.run(hint[1])
    alembic(owner, "upgrade", "head", env=SLOWLY)
    assert stamp(database) == [HEAD]
    assert mismatches(database) == []


@only_client
def test_a_look_at_the_replicas_that_fails_holds_the_backfill(database: Database, owner: Database) -> None:
    database.run(SQL("GRANT pg_monitor TO {}").format(Identifier(owner.value("SELECT current_user"))))

    with running(owner, "upgrade", "head", env=SLOWLY) as run:
        run.says("is in place")
        eventually(lambda: converted(database) > 0)
        database.run("REVOKE EXECUTE ON FUNCTION pg_current_wal_lsn() FROM PUBLIC")
        assert_held(run, database, r"the lag of the replicas can't be seen \(InsufficientPrivilege\)")
        database.run("GRANT EXECUTE ON FUNCTION pg_current_wal_lsn() TO PUBLIC")
        assert run.ends() == 0, run.log

    assert mismatches(database) == []
