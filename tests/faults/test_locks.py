"""Locks of others: the run waits for them in short tries, nobody waits long behind it, and it holds none for long."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import psycopg2
import pytest

from demo.openmemory import TABLE
from tests.support.commands import alembic
from tests.support.engines import by_each
from tests.support.openmemory import Database, checksum, mismatches, random_rows
from tests.support.running import expanded, filled, lock_row, nothing_left, running, slow_rows, transaction, waiting
from tests.support.sessions import converted, eventually, logged_statements
from tests.support.states import BACKFILL, HEAD, indexes, snapshot, stamp, without_extension

__all__ = ["by_each"]

SECRET = "LOCK TABLE openmemory_vectors IN ACCESS SHARE MODE /* whose text is nobody's business */"


class Prober:
    """Reads and writes the table without a pause, and keeps the longest time that a statement took."""

    def __init__(self, database: Database) -> None:
        self.longest_s = 0.0
        self.errors: list[str] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=[database, sql])
            for sql in (
                f"SELECT sector FROM {TABLE} LIMIT 1",
                f"UPDATE {TABLE} SET user_id = 'probe' WHERE ctid = (SELECT min(ctid) FROM {TABLE})",
            )
        ]

    def _repeat(self, database: Database, sql: str) -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            while not self._over.wait(0.01):
                began = time.monotonic()
                try:
                    cursor.execute(sql)
                except psycopg2.Error as error:
                    self.errors.append(str(error))
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    def __enter__(self) -> Prober:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def patient(database: Database) -> None:
    """Have batches wait as long as OM_LOCK_TIMEOUT_MS says: otherwise they give way before a deadlock is looked for."""
    database.run(f"ALTER DATABASE {database.name} SET deadlock_timeout = '10min'")


def under(statements: list[tuple[str, str]], setting: str) -> Iterator[tuple[str, str]]:
    """Give each statement with the value that its session or transaction had set for it, or "as the role has it"."""
    values: dict[str, dict[bool, str]] = {}
    for pid, text in statements:
        value = values.setdefault(pid, {False: "as the role has it"})
        if text in ("COMMIT", "ROLLBACK"):
            value.pop(True, None)
        for given, local in re.findall(rf"set_config\('{setting}', '(\w+)', (true|false)\)", text):
            value[local == "true"] = given
        for given in re.findall(rf"SET LOCAL {setting} (?:=|TO) '?(\w+)", text):
            value[True] = given
        yield text, value.get(True, value[False])


@pytest.mark.parametrize(
    ("before", "command", "after"),
    [
        pytest.param([], ["upgrade", "head"], [HEAD], id="upgrade"),
        pytest.param(["upgrade", BACKFILL], ["downgrade", "base"], [], id="downgrade"),
    ],
)
def test_a_lock_on_the_table_is_waited_for_in_short_tries_and_its_holder_named(
    database: Database, before: list[str], command: list[str], after: list[str]
) -> None:
    v = filled(database, random_rows(300, 8))
    if before:
        alembic(database, *before)

    with (
        transaction(database, SECRET) as holder,
        running(database, *command, env={"OM_LOCK_TIMEOUT_MS": "200"}) as run,
    ):
        named = f'Locks on the table are held by process {holder.info.backend_pid} ("nightly report", role postgres'
        run.says("canceling statement due to lock timeout .*try 1 of 30")
        run.says(re.escape(named))
        run.says("try 6 of 30")
        holder.rollback()
        assert run.ends() == 0, run.log

    pauses = [float(seconds) for seconds in re.findall(r"again in ([\d.]+) s", run.log)]
    assert pauses[5] > pauses[0]
    assert "business" not in run.log
    assert stamp(database) == after
    assert checksum(database) == v
    assert after == [] or mismatches(database) == []


@pytest.mark.slow
def test_readers_and_writers_never_queue_longer_behind_the_run_than_its_lock_timeout(database: Database) -> None:
    filled(database, random_rows(300, 8))

    with (
        transaction(database, SECRET) as holder,
        running(database, "upgrade", "head", env={"OM_LOCK_TIMEOUT_MS": "500"}) as run,
    ):
        run.says("try 1 of 30")
        with Prober(database) as prober:
            run.says("try 5 of 30")
        holder.rollback()
        assert run.ends() == 0, run.log

    assert prober.errors == []
    # they did meet the run in the queue, or the bound would say nothing
    assert 0.1 < prober.longest_s < 2.5


def test_a_lock_that_never_ends_is_an_error_and_nothing_is_changed(database: Database) -> None:
    filled(database, random_rows(300, 8))
    before = without_extension(snapshot(database))

    with (
        transaction(database, SECRET) as holder,
        running(database, "upgrade", "head", env={"OM_LOCK_TIMEOUT_MS": "100"}, patch="tries.TRIES = 3") as run,
    ):
        assert run.ends() > 0
        failed = run.log[run.log.index("FAILED: ") :]
        assert 'adding "v_vector" to "public.openmemory_vectors": no success in 3 tries of 100 ms' in failed
        assert f'process {holder.info.backend_pid} ("nightly report", role postgres, idle in transaction' in failed
        assert "HINT:  Run the same command again" in failed
        assert "Traceback" not in run.log
        assert "business" not in run.log
        assert without_extension(snapshot(database)) == before
        assert not stamp(database)


@pytest.mark.slow
def test_no_other_row_waits_for_a_locked_one(database: Database) -> None:
    v = expanded(database, random_rows(500, 8))
    free = f"SELECT count(*) FROM (SELECT FROM {TABLE} FOR UPDATE SKIP LOCKED) AS free"

    with (
        transaction(database, lock_row(199)) as holder,
        running(database, "upgrade", "head", env={"BACKFILL_BATCH": "100", "OM_LOCK_TIMEOUT_MS": "200"}) as run,
    ):
        run.says("rows are locked, another pass in")
        run.says(f"process {holder.info.backend_pid}")
        # between two passes it has let go of all others
        eventually(lambda: database.value(free) == 499)
        assert converted(database) == 499
        holder.rollback()
        assert run.ends() == 0, run.log

    assert mismatches(database) == []
    assert checksum(database) == v


@pytest.mark.slow
def test_rows_before_the_locked_one_are_let_go_soon(database: Database) -> None:
    expanded(database, random_rows(100, 8))
    patient(database)
    first = f"UPDATE {TABLE} SET user_id = 'written meanwhile' WHERE ctid = (SELECT min(ctid) FROM {TABLE})"

    with (
        transaction(database, lock_row(99)) as holder,
        running(database, "upgrade", "head", env={"BACKFILL_BATCH": "100", "OM_LOCK_TIMEOUT_MS": "3000"}) as run,
    ):
        # the batch has all rows but the last, and waits for that one
        eventually(lambda: waiting(database))
        began = time.monotonic()
        database.run(first)
        assert 0.1 < time.monotonic() - began < 5
        run.says("rows are locked, another pass in")
        holder.rollback()
        assert run.ends() == 0, run.log

    assert mismatches(database) == []


@pytest.mark.slow
def test_a_batch_survives_a_deadlock(database: Database) -> None:
    v = expanded(database, random_rows(200, 8))
    database.run(f"ALTER DATABASE {database.name} SET deadlock_timeout = '2s'")
    first = f"UPDATE {TABLE} SET user_id = 'first' WHERE ctid = (SELECT min(ctid) FROM {TABLE})"

    with (
        # the batch gives way by its lock_timeout, before the server looks for deadlocks, whatever is configured
        transaction(database, "SET deadlock_timeout = '1min'", lock_row(99)) as other,
        running(database, "upgrade", "head", env={"BACKFILL_BATCH": "100", "OM_LOCK_TIMEOUT_MS": "60000"}) as run,
    ):
        eventually(lambda: waiting(database))
        with other.cursor() as cursor:
            cursor.execute(first)
        other.commit()
        assert run.ends() == 0, run.log

    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE user_id = 'first'") == 1
    assert mismatches(database) == []
    assert checksum(database) == v


def test_a_batch_survives_pg_cancel_backend(database: Database) -> None:
    v = expanded(database, random_rows(200, 8))
    patient(database)

    with (
        transaction(database, lock_row(99)) as other,
        running(database, "upgrade", "head", env={"BACKFILL_BATCH": "100", "OM_LOCK_TIMEOUT_MS": "60000"}) as run,
    ):
        (pid,) = eventually(lambda: waiting(database))
        assert database.value("SELECT pg_cancel_backend(%s)", pid)
        run.says(r"due to user request \(SQLSTATE 57014\), try 1 of 30, again with 50 rows")
        other.rollback()
        assert run.ends() == 0, run.log

    assert mismatches(database) == []
    assert checksum(database) == v


@pytest.mark.slow
def test_a_batch_survives_a_statement_timeout_that_is_too_short_for_it(database: Database) -> None:
    v = expanded(database, random_rows(200, 8))
    slow_rows(database, 0.005)
    database.run(f"ALTER ROLE postgres IN DATABASE {database.name} SET statement_timeout = '400ms'")

    done = alembic(database, "upgrade", BACKFILL, env={"BACKFILL_BATCH": "200"})

    assert "due to statement timeout (SQLSTATE 57014), try 1 of 30, again with 100 rows" in done.stderr
    assert mismatches(database) == []
    assert checksum(database) == v


def test_what_reads_the_whole_table_has_no_statement_timeout(database: Database) -> None:
    filled(database, random_rows(300, 8))
    with logged_statements(database) as statements:
        alembic(database, "upgrade", "head")
        alembic(database, "downgrade", "base")

    # what reads by place reads a part only, and is tried again; what reads no row only locks the table
    whole = {
        (text, timeout)
        for text, timeout in under(statements, "statement_timeout")
        if re.match(rf"SELECT .* FROM (ONLY )?\S*{TABLE}", text) and not re.search("ctid|WHERE false", text)
    }
    assert len(whole) >= 5
    assert [text for text, timeout in whole if timeout != "0"] == []


@pytest.mark.parametrize("adopted", [False, True], ids=["fresh", "adopted column"])
def test_nothing_rewrites_the_table(database: Database, adopted: bool) -> None:
    filled(database, random_rows(300, 8))
    if adopted:
        # setting the dimension of this one would rewrite the table
        database.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector")
        database.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]'")
    files = f"""
        SELECT pg_relation_filenode(oid), pg_relation_filenode(reltoastrelid), pg_relation_filenode('{TABLE}_pkey')
        FROM pg_class WHERE oid = '{TABLE}'::regclass
        """
    before = database.rows(files)

    alembic(database, "upgrade", "head")
    assert mismatches(database) == []
    assert database.rows(files) == before
    alembic(database, "downgrade", "base")
    assert database.rows(files) == before


def test_whatever_locks_the_table_has_a_lock_timeout(database: Database) -> None:
    filled(database, random_rows(300, 8))
    # with a column of somebody else's all the statements that there are come to pass
    database.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector(8)")
    with logged_statements(database) as statements:
        alembic(database, "upgrade", "head", env={"OM_LOCK_TIMEOUT_MS": "321"})
        alembic(database, "downgrade", "base", env={"OM_LOCK_TIMEOUT_MS": "321"})

    seen: dict[str, set[str]] = {}
    for text, timeout in under(statements, "lock_timeout"):
        copy = text.startswith("COPY")  # out of the table, and through the stage into it
        if (verb := re.match("(CREATE|ALTER|DROP|COMMENT|REVOKE|UPDATE|COPY) [A-Z ]*", text)) and (
            TABLE in text or copy
        ):
            seen.setdefault(verb[0].strip(), set()).add(timeout)

    assert seen == {verb: {"1h"} if "CONCURRENTLY" in verb else {"321ms"} for verb in seen}
    assert {
        "ALTER TABLE",
        "CREATE INDEX CONCURRENTLY",
        "CREATE OR REPLACE TRIGGER",
        "DROP INDEX CONCURRENTLY IF EXISTS",
        "DROP TRIGGER",
        "COPY",
    } <= set(seen)


@pytest.mark.slow
def test_a_killed_run_keeps_no_lock(database: Database) -> None:
    expanded(database, random_rows(200, 8))

    with (
        transaction(database, lock_row(99)),
        running(database, "upgrade", "head", env={"BACKFILL_BATCH": "100", "OM_LOCK_TIMEOUT_MS": "300"}) as run,
    ):
        eventually(lambda: waiting(database))
        run.kill()
        eventually(lambda: nothing_left(database), 5)
        assert not database.rows("SELECT FROM pg_locks WHERE locktype = 'advisory' AND database = 0")

    alembic(database, "upgrade", "head")
    assert mismatches(database) == []
    assert indexes(database)
