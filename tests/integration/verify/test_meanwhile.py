"""`verify` beside other work: writers, DDL, a server that goes away, a signal."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.cli import main
from openmemory_migrations.db import connections
from openmemory_migrations.verify import verification
from tests.support.commands import om, result, start_om
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.servers import OPTIONS, programs
from tests.support.sessions import eventually, sessions
from tests.support.verification import DIM, ROWS, UNSEARCHED, compared, forget, key, set_v, table
from tests.support.writers import writing

__all__ = ["table"]  # a fixture

LONG = ("--queries", "500")  # some seconds of searches, all in the one snapshot


@contextmanager
def locked(database: Database, *sql: str) -> Iterator[None]:
    """A transaction that has done this to the table; it commits at the end."""
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        for one in sql:
            cursor.execute(one)
        yield
        cursor.execute("COMMIT")


def waits_for_the_lock(database: Database) -> bool:
    return bool(sessions(database, extra="AND wait_event_type = 'Lock'"))


def in_its_snapshot(database: Database) -> bool:
    return bool(sessions(database, extra="AND query LIKE '%AS distance%'"))


def test_rows_that_are_written_meanwhile_are_never_called_wrong(table: Database) -> None:
    with writing(table, ROWS) as writers:
        for _ in range(2):
            before = sum(writer.writes for writer in writers)
            found, _ = compared(table, 0)
            assert sum(writer.writes for writer in writers) - before > 100

    assert found["looked_at_again"] == 0
    assert found["rows"] > len(ROWS) / 2


class Run(NamedTuple):
    code: int
    comparison: dict[str, Any]


Beside = Callable[[Callable[[], object]], Run]


@pytest.fixture
def beside(table: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Beside:
    """Runs the command in this process, and something else while its snapshot is open, when the rows are compared."""
    search = verification.search
    monkeypatch.setenv("OM_DATABASE_URL", table.url)

    def run(meanwhile: Callable[[], object]) -> Run:
        def searching(*args: Any) -> object:
            meanwhile()
            return search(*args)

        monkeypatch.setattr(verification, "search", searching)
        code = main(["verify", "--json", "--queries", "5"])
        said = capsys.readouterr()
        assert said.out, said.err
        return Run(code, json.loads(said.out)["comparison"])

    return run


@pytest.mark.slow
def test_without_the_trigger_what_a_backfill_converts_meanwhile_is_looked_at_again(
    table: Database, beside: Beside
) -> None:
    table.run(f"ALTER TABLE {TABLE} DISABLE TRIGGER USER")
    load(table, random_rows(50, DIM, seed=1))

    done = beside(lambda: om(table, "backfill"))

    # for the trigger, which is off; no row is wrong
    assert done.code == 1
    assert (done.comparison["looked_at_again"], done.comparison["equal"]) == (50, len(ROWS) + 50)
    assert done.comparison["wrong"] == []


@pytest.mark.parametrize("by_key", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_was_wrong_in_the_snapshot_is_looked_at_again(table: Database, beside: Beside, by_key: bool) -> None:
    """Meanwhile all is put right but for one row, which goes to a page that wasn't there before."""
    if not by_key:
        table.run(f"ALTER TABLE {TABLE} DROP CONSTRAINT openmemory_vectors_pkey")
    forget(table, *ROWS[:50])

    def repair() -> None:
        table.run(f"UPDATE {TABLE} SET v = v WHERE v_vector IS NULL AND id <> %s", ROWS[0].id)
        for where in ("", "", f" WHERE id = '{ROWS[0].id}'"):
            table.run(f"UPDATE {TABLE} SET user_id = user_id{where}")

    done = beside(repair)

    assert done.code == 1
    assert done.comparison["looked_at_again"] == 49
    (wrong,) = done.comparison["wrong"]
    assert (wrong["kind"], wrong["rows"]) == ("missing", 1)
    assert not by_key or wrong["keys"] == [key(ROWS[0])]


@pytest.mark.slow
def test_a_row_that_goes_meanwhile_is_not_wrong(table: Database, beside: Beside) -> None:
    forget(table, *ROWS[:3])

    def go() -> None:
        table.run(f"DELETE FROM {TABLE} WHERE id = ANY (%s::uuid[])", [row.id for row in ROWS[:2]])
        set_v(table, ROWS[2], None)

    done = beside(go)

    assert (done.code, done.comparison["looked_at_again"]) == (0, 3)


@pytest.mark.slow
def test_the_table_stays_until_the_end(table: Database, beside: Beside) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DROP TABLE %' AND wait_event_type = 'Lock'"
    dropping = threading.Thread(target=table.run, args=(f"DROP TABLE {TABLE}",))

    def drop() -> None:
        dropping.start()
        eventually(lambda: table.value(waiting))

    done = beside(drop)

    assert (done.code, done.comparison["equal"]) == (0, len(ROWS))
    dropping.join()
    assert table.value("SELECT to_regclass(%s)", TABLE) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("DROP TABLE {}", f'table "public.{TABLE}" does not exist'),
        (
            f"DROP TABLE {{0}}; CREATE TABLE {{0}} (id uuid, sector text, v bytea, v_vector vector({DIM}))",
            "has no column",
        ),
        ("ALTER TABLE {} DROP COLUMN v_vector", "has no column"),
    ],
)
def test_a_table_that_is_changed_while_it_is_waited_for_is_looked_at_as_it_is_then(
    table: Database, changed: str, said: str
) -> None:
    with locked(table, f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE", changed.format(TABLE)):
        process = start_om(table, "verify", *UNSEARCHED)
        eventually(lambda: waits_for_the_lock(table))

    done = result(process)

    assert (done.returncode, done.stdout) == (1, ""), done.log
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_table_that_is_rewritten_between_the_look_and_the_lock_is_seen_as_it_is_then(table: Database) -> None:
    """To a snapshot from before a table that ALTER TABLE has written anew is empty, and so without an error."""
    forget(table, ROWS[7])
    with locked(table, f"ALTER TABLE {TABLE} ALTER dim TYPE bigint", f"ALTER TABLE {TABLE} ALTER dim TYPE integer"):
        process = start_om(table, "verify", *UNSEARCHED)
        eventually(lambda: waits_for_the_lock(table))

    done = result(process)

    assert done.returncode == 1, done.log
    assert f"{len(ROWS):,} looked at; {len(ROWS) - 1:,} equal to the bit" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_it_in_order(table: Database, number: signal.Signals) -> None:
    process = start_om(table, "verify", *LONG)
    eventually(lambda: in_its_snapshot(table))
    process.send_signal(number)

    done = result(process)

    assert done.returncode != 0
    assert done.stdout == ""
    assert f"ERROR:  stopped by {number.name}" in done.stderr
    assert "Traceback" not in done.stderr
    eventually(lambda: not sessions(table), 10)


@pytest.fixture
def mortal() -> Iterator[tuple[embedded.Server, Database]]:
    """A server of its own, with ROWS, to be stopped."""
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        database = Database("postgres", server.url())
        create_table(database)
        load(database, ROWS)
        assert om(database, "upgrade", "-x", "index=hnsw").returncode == 0
        yield server, database


@pytest.mark.slow
def test_a_server_that_restarts_in_the_middle(mortal: tuple[embedded.Server, Database]) -> None:
    server, database = mortal
    process = start_om(database, "verify", *LONG)
    eventually(lambda: in_its_snapshot(database))
    server.stop("immediate")
    server.start()

    done = result(process)

    assert done.returncode == 0, done.log
    assert "the connection was lost" in done.stderr
    assert f"{len(ROWS):,} equal to the bit" in done.stdout


@pytest.mark.slow
def test_a_server_that_stays_away(
    mortal: tuple[embedded.Server, Database], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, database = mortal
    monkeypatch.setattr(connections, "RECONNECT_PAUSES", (0.1, 0.1))
    monkeypatch.setenv("OM_DATABASE_URL", database.url)

    def stop() -> None:
        eventually(lambda: in_its_snapshot(database))
        server.stop("immediate")

    stopping = threading.Thread(target=stop)
    stopping.start()
    code = main(["verify", *LONG])
    stopping.join()

    said = capsys.readouterr()
    assert (code, said.out) == (3, "")
    assert "ERROR:  database: " in said.err
    assert "Traceback" not in said.err
