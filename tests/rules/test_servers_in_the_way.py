"""R11: what of the server's own state is in the way, told by check and step alike; and servers that go."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import alembic, om, result, start_om
from tests.support.openmemory import (
    Database,
    create_database,
    create_table,
    load,
    mismatches,
    random_rows,
)
from tests.support.preflight import check, finding
from tests.support.running import running
from tests.support.servers import OPTIONS, programs, replicated
from tests.support.sessions import eventually, terminate
from tests.support.states import EXPAND, column_type

ROWS = random_rows(20, 8)
CHAIN = ("upgrade", "head"), ("downgrade", "base"), ("-n", "cutover", "upgrade", "head")


READS = "ALTER DATABASE {} SET default_transaction_read_only = on"


def _refused(database: Database, chain: Sequence[Sequence[str]]) -> None:
    told = finding(check(database, 1), "read-only")
    for command in chain:
        refused = alembic(database, *command, env={"OM_CUTOVER": "swap"}, check=False)
        assert f"FAILED: {told['message']}\nHINT:  {told['hint']}\n" in refused.log
    for repeated in ("backfill", "index", "repair"):
        done = om(database, repeated)
        assert (done.returncode, f"ERROR:  {told['message']}\n" in done.log) == (1, True)


def _write(database: Database) -> None:
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = off")
        cursor.execute(f"ALTER DATABASE {database.name} RESET default_transaction_read_only")


def test_a_role_that_only_reads_is_told_so_by_check_and_steps_alike(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(READS.format(database.name))
    _refused(database, CHAIN)
    assert column_type(database) is None
    _write(database)

    alembic(database, "upgrade", "head")
    database.run(READS.format(database.name))
    alembic(database, "upgrade", "head")  # nothing is left to do
    _refused(database, CHAIN[1:])
    assert column_type(database)
    _write(database)
    assert mismatches(database) == []


@pytest.mark.slow
def test_a_standby_is_told_so_by_check_and_steps_alike() -> None:
    with replicated(60) as pair:
        standby = Database(pair.database.name, pair.replica.url(pair.database.name))
        told = finding(check(standby, 1), "standby")
        for command in CHAIN:
            refused = alembic(standby, *command, env={"OM_CUTOVER": "swap"}, check=False)
            assert f"FAILED: {told['message']}\nHINT:  {told['hint']}\n" in refused.log


@pytest.mark.slow
def test_what_a_standby_ends_is_said_to_be_its_doing() -> None:
    """It ends what keeps it from its primary's changes, again and again."""
    with replicated(60) as pair:
        alembic(pair.database, "upgrade", "head")
        standby = Database(pair.database.name, pair.replica.url(pair.database.name))
        caught_up = "SELECT pg_current_wal_lsn() <= max(replay_lsn) FROM pg_stat_replication"
        eventually(lambda: pair.database.value(caught_up))
        patch = "connections.RECONNECT_PAUSES = (0.1,)"
        process = start_om(standby, "verify", "--queries", "60", "--fail-under", "1", patch=patch)
        while process.poll() is None:
            terminate(standby, extra=f"AND query LIKE '%{TABLE}%'")

        done = result(process)

        assert done.returncode == 3
        assert "ERROR:  database: the connection was lost" in done.log
        assert "HINT:  This server is a standby" in done.log


@pytest.mark.slow
def test_a_failover_in_the_middle_is_survived() -> None:
    with replicated(3000) as pair:
        name = pair.database.name
        hosts = f"host={pair.primary.socket_dir},{pair.replica.socket_dir}&target_session_attrs=read-write"
        both = Database(name, f"postgresql://postgres@/{name}?{hosts}")
        env = {"BACKFILL_BATCH": "100", "OM_BACKFILL_PAUSE_MS": "100"}
        with running(both, "upgrade", "head", env=env) as run:
            standby = Database(name, pair.replica.url(name))
            eventually(lambda: standby.value(f"SELECT count(v_vector) FROM {TABLE}") > 300)
            pair.primary.stop("immediate")
            run.says("the connection was lost")
            standby.value("SELECT pg_promote()")
            assert run.ends() == 0
        assert mismatches(standby) == []
        pair.primary.start()


@pytest.mark.slow
def test_a_prepared_transaction_is_named_with_what_ends_it() -> None:
    """It has no session, and goes on under the number of the one that has prepared it."""
    with embedded.temporary(bin=programs(), options={**OPTIONS, "max_prepared_transactions": "2"}) as server:
        database = create_database(server, "prepared")
        create_table(database)
        load(database, ROWS)
        held = f"BEGIN; UPDATE {TABLE} SET user_id = 'z'; PREPARE TRANSACTION 'it''s forgotten'"
        named = (
            r"the prepared transaction 'it''s forgotten' \(role postgres, since [\d:]+ \w+\), which (ROLLBACK .*) ends"
        )
        short = {"OM_LOCK_TIMEOUT_MS": "20"}
        database.run(held)
        with running(database, "upgrade", EXPAND, env=short) as run:
            run.says("Locks on the table are held by " + named)
        server.stop()  # after which it has a number of its own
        server.start()
        with running(database, "upgrade", "om_20240107_backfill", env=short) as run:
            found = run.says("Locks on the table are held by " + named)
            database.run(found[1])
            assert run.ends() == 0
        database.run(held)
        with running(database, "upgrade", "head", env={"OM_INDEX": "hnsw"}) as run:
            found = run.says("until transactions that are open now are over\nDETAIL:  " + named)
            database.run(found[1])
            assert run.ends() == 0
        assert mismatches(database) == []
