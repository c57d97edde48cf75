"""What others do to the rows of a batch between its read and its write: no row ever gets a value that is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from psycopg2.extensions import connection as Session
from sqlalchemy.engine import CursorResult

from demo.openmemory import TABLE
from openmemory_migrations.backfill.reader import LOCKED_FILENODE
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.sql import Fragment
from tests.support.commands import alembic
from tests.support.engines import by_client
from tests.support.openmemory import Database, create_table, expected, load, mismatches, pack, random_rows
from tests.support.package import run_backfill
from tests.support.running import session
from tests.support.sessions import converted, eventually, sessions
from tests.support.states import EXPAND

__all__ = ["by_client"]

ROWS, DIM, BATCH = 400, 16, 100
DATA = random_rows(ROWS, DIM)
GOOD, OTHER = (row.v for row in random_rows(2, DIM, seed=1))
VALUES = {"good": GOOD, "nan": pack([1.0] * (DIM - 1) + [float("nan")])}
CHANGES = {
    "good bytes": ["UPDATE {t} SET v = %(good)s WHERE {row}"],
    "good bytes, then the old ones again": [
        "UPDATE {t} SET v = %(good)s WHERE {row}",
        "UPDATE {t} SET v = %(v)s WHERE {row}",
    ],
    "the same bytes": ["UPDATE {t} SET v = v WHERE {row}"],
    "NaN": ["UPDATE {t} SET v = %(nan)s WHERE {row}"],
    "a wrong length": ["UPDATE {t} SET v = '\\x0102' WHERE {row}"],
    "another dimension": ["UPDATE {t} SET v = v || v WHERE {row}"],
    "no bytes": ["UPDATE {t} SET v = NULL WHERE {row}"],
    "another column": ["UPDATE {t} SET user_id = 'changed' WHERE {row}"],
    "another key": ["UPDATE {t} SET sector = 'changed' WHERE {row}"],
    "deleted": ["DELETE FROM {t} WHERE {row}"],
    "deleted and written anew": [
        "DELETE FROM {t} WHERE {row}",
        "INSERT INTO {t} VALUES (%(id)s, %(sector)s, %(user_id)s, %(good)s, %(dim)s)",
    ],
}
CHANGED = dict(enumerate(list(CHANGES) * 3))  # number of a row in the first batch -> what is done to it
REWRITES = [
    f"VACUUM FULL {TABLE}",
    f"CLUSTER {TABLE} USING {TABLE}_pkey",
    f"ALTER TABLE {TABLE} ALTER user_id TYPE varchar(99)",
    f"TRUNCATE {TABLE}",
]
TRIGGER = pytest.mark.parametrize("trigger", ["on", "off"], ids=["trigger", "no trigger"])
Hook = Callable[[int, int], None]


class Interfering(PackageDatabase):
    """The package's connections, with others at work around each read and write."""

    before_lock: Hook = staticmethod(lambda *_: None)  # of the next read
    before_read: Hook = staticmethod(lambda *_: None)
    after_read: Hook = staticmethod(lambda *_: None)
    before_write: Hook = staticmethod(lambda *_: None)
    numbers: dict[str, int]  # of all connections together: one reads, another writes

    def run(
        self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: Fragment
    ) -> CursorResult[Any]:
        if template == LOCKED_FILENODE:
            self.before_lock(self.numbers["read"] + 1, self.numbers["page"])
        return super().run(template, parameters, **names)

    def copy_out(self, template: str, /, **names: Fragment) -> bytes | memoryview:
        self.numbers["read"] = read = self.numbers["read"] + 1
        self.numbers["page"] = int(names["page"])
        self.before_read(read, int(names["page"]))
        copied = super().copy_out(template, **names)
        self.after_read(read, int(names["page"]))
        return copied

    def copy_in(self, table: str, data: bytes) -> None:
        self.numbers["write"] += 1
        self.before_write(self.numbers["write"], 0)
        super().copy_in(table, data)


def interfering(**hooks: Hook) -> type[Interfering]:
    own = {"numbers": {"read": 0, "write": 0, "page": 0}}
    return type("Hooked", (Interfering,), own | {name: staticmethod(hook) for name, hook in hooks.items()})


def prepared(database: Database, trigger: str = "on") -> None:
    create_table(database)
    database.run(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = off)")
    load(database, DATA)
    alembic(database, "upgrade", EXPAND, env={"OM_SYNC_TRIGGER": trigger})


def change(connection: Session, what: str, number: int) -> None:
    row = DATA[number]
    with connection.cursor() as cursor:
        for statement in CHANGES[what]:
            sql = statement.format(t=TABLE, row="id = %(id)s AND sector = %(sector)s")
            cursor.execute(sql, VALUES | row._asdict())
            assert cursor.rowcount == 1


def stale(database: Database) -> list[str]:
    """What was done to the rows that have a vector which is not their v to the bit; none at all is not stale."""
    names = {DATA[number].id: what for number, what in CHANGED.items()}
    found = database.rows(f"SELECT id, v, vector_send(v_vector) FROM {TABLE} WHERE v_vector IS NOT NULL")
    return [names.get(id, id) for id, v, sent in found if bytes(sent) != expected(v)]


@TRIGGER
def test_rows_changed_between_read_and_write_never_get_an_old_value(database: Database, trigger: str) -> None:
    prepared(database, trigger)

    def before_write(read: int, _: int) -> None:
        if read == 1:
            with session(database) as other:
                for number, what in CHANGED.items():
                    change(other, what, number)
                other.commit()
        if read == 2:
            # the first batch is committed
            assert converted(database) >= BATCH - len(CHANGED)
            assert stale(database) == []

    run_backfill(database, interfering(before_write=before_write), backfill_batch=BATCH)

    assert mismatches(database) == []


@TRIGGER
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_rows_that_are_locked_when_the_batch_is_written_never_get_an_old_value(
    database: Database, end: str, trigger: str
) -> None:
    """The write waits for the first of them, then finds it changed, or as it was."""
    prepared(database, trigger)
    threads: list[threading.Thread] = []
    locked = threading.Event()

    def hold() -> None:
        with session(database) as other:
            for number, what in CHANGED.items():
                change(other, what, number)
            locked.set()
            eventually(lambda: sessions(database, extra="AND wait_event_type = 'Lock'"))
            getattr(other, end)()

    def before_write(read: int, _: int) -> None:
        if not threads:
            threads.append(threading.Thread(target=hold))
            threads[0].start()
            assert locked.wait(10)
        else:
            assert stale(database) == []

    run_backfill(database, interfering(before_write=before_write), backfill_batch=BATCH)
    threads[0].join()

    assert mismatches(database) == []
    if end == "rollback":
        assert converted(database) == ROWS


def test_a_row_that_takes_the_place_of_another_never_gets_its_value(database: Database) -> None:
    prepared(database, "off")
    place = f"SELECT ctid::text FROM {TABLE} WHERE id = %s"
    newcomers = [row._replace(v=OTHER) for row in random_rows(3, DIM, seed=2)]

    def after_read(read: int, _: int) -> None:
        if read > 1:
            return
        left = {database.value(place, DATA[number].id) for number in (3, 4, 5)}
        for number in (3, 4, 5):
            database.run(f"DELETE FROM {TABLE} WHERE id = %s", DATA[number].id)
        database.run(f"VACUUM {TABLE}")
        load(database, newcomers)
        assert {database.value(place, row.id) for row in newcomers} == left

    run_backfill(database, interfering(after_read=after_read), backfill_batch=BATCH)

    assert mismatches(database) == []
    assert converted(database) == ROWS


# after deadlock_timeout, a second, the batch has looked for a deadlock, and then the application looks
@pytest.mark.parametrize(("lock_timeout_ms", "think"), [(500, 0), (5_000, 1.2)])
def test_a_transaction_of_the_application_is_never_the_victim_of_a_deadlock(
    database: Database, lock_timeout_ms: int, think: float
) -> None:
    """It has a late row of the batch, then wants an early one, which the batch has by then."""
    prepared(database)
    threads: list[threading.Thread] = []
    locked = threading.Event()
    waited: list[float] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with session(database) as other:
                change(other, "good bytes", BATCH - 1)
                locked.set()
                eventually(lambda: sessions(database, extra="AND wait_event_type = 'Lock'"))
                time.sleep(think)
                started = time.monotonic()
                change(other, "another column", 0)
                waited.append(time.monotonic() - started)
                other.commit()
        except BaseException as error:
            errors.append(error)

    def before_write(read: int, _: int) -> None:
        if not threads:
            threads.append(threading.Thread(target=work))
            threads[0].start()
            assert locked.wait(10)

    run_backfill(
        database, interfering(before_write=before_write), backfill_batch=BATCH, lock_timeout_ms=lock_timeout_ms
    )
    threads[0].join()

    assert errors == []
    print(f"the application waited {waited[0]:.3f} s")
    assert mismatches(database) == []
    assert converted(database) == ROWS


@TRIGGER
@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_table_rewritten_between_read_and_write_gives_no_row_the_value_of_another(
    database: Database, rewrite: str, trigger: str
) -> None:
    """All rows have the same xmin, a rewrite keeps it, and after a few deleted ones each takes another's place."""
    prepared(database, trigger)
    database.run(f"DELETE FROM {TABLE} WHERE ctid < '(0,4)'")
    places = f"SELECT count(*) FROM {TABLE} t JOIN before b ON b.place = t.ctid AND b.version = t.xmin AND b.id <> t.id"
    taken = []

    def before_write(write: int, _: int) -> None:
        if write != 1:
            return
        database.run(f"CREATE TABLE before AS SELECT ctid AS place, xmin AS version, id FROM {TABLE}")
        database.run(rewrite)
        taken.append(database.value(places))

    run_backfill(database, interfering(before_write=before_write), backfill_batch=BATCH)

    assert taken[0] > BATCH or rewrite.startswith(
        ("ALTER", "TRUNCATE")
    )  # those give the rows a new xmin, or none are left
    assert converted(database) == database.value(f"SELECT count(*) FROM {TABLE}")
    assert mismatches(database) == []


@pytest.mark.slow
def test_a_table_rewritten_between_two_batches_is_converted_whole(database: Database) -> None:
    prepared(database)
    moved = []

    def before_lock(read: int, page: int) -> None:
        if read == 4:
            # the first batches are gone, and what follows takes their place
            database.run(f"DELETE FROM {TABLE} WHERE v_vector IS NOT NULL")
            database.run(f"VACUUM FULL {TABLE}")
            behind = f"SELECT count(*) FROM {TABLE} WHERE v_vector IS NULL AND ctid < '({page},0)'"
            moved.append(database.value(behind))

    run_backfill(database, interfering(before_lock=before_lock), backfill_batch=BATCH)

    assert moved[-1] > 0
    assert converted(database) == database.value(f"SELECT count(*) FROM {TABLE}") <= ROWS - BATCH
    assert mismatches(database) == []


@TRIGGER
def test_rows_that_move_behind_the_scan_are_converted(database: Database, trigger: str) -> None:
    prepared(database, trigger)
    moved: list[int] = []

    def before_read(read: int, page: int) -> None:
        if read == 4:
            # room in the first pages, which an update of any column moves a row to from a page that is full
            database.run(f"DELETE FROM {TABLE} WHERE ctid < '(2,0)'")

            def move() -> int:
                # as long as a batch is being written the vacuum makes no room
                database.run(f"VACUUM {TABLE}")
                database.run(f"UPDATE {TABLE} SET user_id = user_id WHERE v_vector IS NULL")
                sql = f"SELECT count(*) FROM {TABLE} WHERE v_vector IS NULL AND ctid < '({page},0)'"
                moved.append(database.value(sql))
                return moved[-1]

            eventually(move)

    run_backfill(database, interfering(before_read=before_read), backfill_batch=BATCH)

    assert moved[-1] > 0
    assert converted(database) == database.value(f"SELECT count(*) FROM {TABLE}")
    assert mismatches(database) == []
