"""The application writes and reads at full speed through the cutover, its undoing and the next: nothing lost or stale.

A writer that sends bytes sends vectors from the error on that it gets at the switch, and bytes again after the undoing.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress

import psycopg2
import pytest
from psycopg2.extensions import cursor as Cursor

from demo.openmemory import TABLE
from tests.support.commands import alembic, start_alembic
from tests.support.cutover import BAD, DOWN, LOSS, UP, Values, both_modes, bytes_of, cut_over, text_of, undo, vectors_of
from tests.support.interruption import kill
from tests.support.openmemory import SECTORS, Database, Row, create_table, expected, load, mismatches, random_rows
from tests.support.sessions import eventually
from tests.support.writers import Key

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

DIM = 32
SLOWLY = {"BACKFILL_BATCH": "50", "OM_BACKFILL_WORKERS": "2"}
WRONG_TYPE, NO_COLUMN = "42804", "42703"
HAS_V = f"SELECT count(*) FROM pg_attribute WHERE attrelid = '{TABLE}'::regclass AND attname = 'v' AND NOT attisdropped"


class Moved(Exception):
    """`v_vector` can be written as before when a drop is undone: who writes it has to look whether `v` is back."""


class Writer(threading.Thread):
    """Rows of its own, so that it knows what each has to hold; `moves` are what told it to write in the other way."""

    def __init__(self, database: Database, number: int, rows: Sequence[Row], mode: str) -> None:
        super().__init__(name=f"writer {number}", daemon=True)
        self.rows: Values = {(row.id, row.sector): row.v for row in rows}
        self.moves: list[str] = []
        self.writes = 0
        self.error: BaseException | None = None
        self.stopping = threading.Event()
        self._database, self._mode, self._vectors = database, mode, False
        self._keys = list(self.rows)
        self._random = random.Random(number)
        self._values = [row.v for row in random_rows(300, DIM, seed=100 + number)]

    def run(self) -> None:
        try:
            with closing(self._database.connect()) as connection, connection.cursor() as cursor:
                while not self.stopping.is_set():
                    self._transaction(cursor)
                    self.writes += 1
        except BaseException as error:
            self.error = error

    def _transaction(self, cursor: Cursor) -> None:
        """A few writes; all of them again, in the other way, where the column has changed meanwhile."""
        writes = [self._chosen() for _ in range(self._random.choice([1, 1, 1, 5]))]
        while True:
            try:
                after = dict(self.rows)
                cursor.execute("BEGIN")
                for write, key, v in writes:
                    write(cursor, after, key, v)
                self._look(cursor)
                cursor.execute("COMMIT")
                self.rows = after
                return
            except psycopg2.Error as error:
                if error.pgcode not in (WRONG_TYPE, NO_COLUMN):
                    raise
                self.moves.append(error.diag.message_primary or "")
            except Moved:
                self.moves.append("looked")
            cursor.execute("ROLLBACK")
            self._vectors = not self._vectors

    def _look(self, cursor: Cursor) -> None:
        if self._vectors and self._mode == "drop":
            cursor.execute(HAS_V)
            if cursor.fetchone() != (0,):
                raise Moved

    def _chosen(self) -> tuple[Callable[..., None], Key, bytes | None]:
        (write,) = self._random.choices([self._upsert, self._update, self._update_user, self._forget], [35, 30, 25, 10])
        if self._random.random() < 0.1:
            self._keys.append((str(uuid.UUID(int=self._random.getrandbits(128))), self._random.choice(SECTORS)))
        v = None if self._random.random() < 0.05 else self._random.choice(self._values)
        return write, self._random.choice(self._keys), v

    @property
    def _column(self) -> str:
        return "v_vector" if self._vectors and self._mode == "drop" else "v"

    @property
    def _place(self) -> str:
        return "%s::vector" if self._vectors else "%s::bytea"

    def _sent(self, v: bytes | None) -> object:
        return text_of(v) if v and self._vectors else v

    def _upsert(self, cursor: Cursor, rows: Values, key: Key, v: bytes | None) -> None:
        cursor.execute(
            f"INSERT INTO {TABLE} (id, sector, user_id, {self._column}, dim) VALUES (%s, %s, 'u', {self._place}, {DIM})"
            f" ON CONFLICT (id, sector) DO UPDATE SET {self._column} = EXCLUDED.{self._column}",
            (*key, self._sent(v)),
        )
        rows[key] = v

    def _update(self, cursor: Cursor, rows: Values, key: Key, v: bytes | None) -> None:
        sql = f"UPDATE {TABLE} SET {self._column} = {self._place} WHERE id = %s AND sector = %s"
        cursor.execute(sql, (self._sent(v), *key))
        if key in rows:
            rows[key] = v

    def _update_user(self, cursor: Cursor, _: Values, key: Key, __: bytes | None) -> None:
        cursor.execute(f"UPDATE {TABLE} SET user_id = user_id || '.' WHERE id = %s AND sector = %s", key)

    def _forget(self, cursor: Cursor, rows: Values, key: Key, _: bytes | None) -> None:
        cursor.execute(f"DELETE FROM {TABLE} WHERE id = %s AND sector = %s", key)
        rows.pop(key, None)


class Reader(threading.Thread):
    """Reads rows that nobody writes: whatever the columns are called, each has its value."""

    def __init__(self, database: Database, rows: Sequence[Row]) -> None:
        super().__init__(name="reader", daemon=True)
        self.stopping = threading.Event()
        self.error: BaseException | None = None
        self.seen: set[str] = set()
        self._database, self._rows = database, rows

    def run(self) -> None:
        try:
            with closing(self._database.connect()) as connection, connection.cursor() as cursor:
                while not self.stopping.is_set():
                    for row in self._rows:
                        self._read(cursor, row)
        except BaseException as error:
            self.error = error

    def _read(self, cursor: Cursor, row: Row) -> None:
        cursor.execute(f"SELECT * FROM {TABLE} WHERE id = %s AND sector = %s", (row.id, row.sector))
        (found,) = cursor.fetchall()
        assert cursor.description
        values = {column.name: value for column, value in zip(cursor.description, found, strict=True)}
        v = values.get("v", values.get("v_vector"))
        assert v is not None, values
        text = text_of(row.v or b"")
        if isinstance(v, str):
            assert [float(x) for x in v[1:-1].split(",")] == [float(x) for x in text[1:-1].split(",")]
        else:
            assert bytes(v) == row.v
        self.seen.add(type(v).__name__ if "v" in values else "no v")


@contextmanager
def busy(database: Database, threads: Sequence[Writer | Reader]) -> Iterator[None]:
    """They have stopped, without an error, when this is left."""
    for thread in threads:
        thread.start()
    with ExitStack() as stack:
        for thread in threads:
            stack.callback(thread.join, 60)
        for thread in threads:
            stack.callback(thread.stopping.set)
        yield
    assert [thread.error for thread in threads] == [None] * len(threads)


def wait(writers: Sequence[Writer], since: Sequence[int]) -> None:
    """Until each has written something more."""
    eventually(lambda: all(w.error or w.writes > before + 5 for w, before in zip(writers, since, strict=True)))


def rows_of(writer: Writer) -> list[Row]:
    return [Row(id, sector, "", v, DIM) for (id, sector), v in writer.rows.items()]


@both_modes
def test_the_cutover_up_down_and_up_again_while_the_application_writes(database: Database, mode: str) -> None:
    create_table(database)
    data, unwritten = random_rows(1500, DIM), random_rows(20, DIM, seed=77)
    load(database, [*data, *unwritten, *BAD])
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)})
    env = {**SLOWLY, "OM_ACCEPT_LOSS": str(LOSS)}
    writers = [Writer(database, number, data[number::3], mode) for number in range(3)]
    still: Values = {(row.id, row.sector): row.v for row in (*unwritten, *BAD)}

    with busy(database, [*writers, Reader(database, unwritten)]):
        cut_over(database, mode, env)
        wait(writers, [writer.writes for writer in writers])
        undo(database, env)
        wait(writers, [writer.writes for writer in writers])

    remembered = still | {key: v for writer in writers for key, v in writer.rows.items()}
    assert bytes_of(database) == remembered
    assert mismatches(database) == []
    assert {len(writer.moves) for writer in writers} == {2}

    again = [Writer(database, 10 + number, rows_of(writer), mode) for number, writer in enumerate(writers)]
    reader = Reader(database, unwritten)
    with busy(database, [*again, reader]):
        cut_over(database, mode, env)
        wait(again, [writer.writes for writer in again])

    remembered = {(row.id, row.sector): row.v for row in (*unwritten, *BAD[LOSS:])}
    remembered |= {key: v for writer in again for key, v in writer.rows.items()}
    vector = "v" if mode == "swap" else "v_vector"
    assert vectors_of(database, vector) == {key: expected(v, DIM) for key, v in remembered.items()}
    assert {move for writer in again for move in writer.moves} == {
        'column "v" is of type vector but expression is of type bytea'
        if mode == "swap"
        else f'column "v" of relation "{TABLE}" does not exist'
    }
    assert reader.seen == {"memoryview", "str" if mode == "swap" else "no v"}


def killed_when(database: Database, command: tuple[str, ...], env: Mapping[str, str], reached: str) -> None:
    """Kill a run as soon as the query says true; before there is a column to ask for it doesn't."""
    process = start_alembic(database, *command, env={"OM_CUTOVER": "drop", **env})

    def there() -> object:
        with suppress(psycopg2.Error):
            return database.value(reached)
        return False

    eventually(there)
    kill(process)


@pytest.mark.exhaustive
def test_killed_on_the_way_there_and_back_while_the_application_writes(database: Database) -> None:
    create_table(database)
    data = random_rows(1000, DIM)
    load(database, [*data, *BAD])
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)})
    env = {"BACKFILL_BATCH": "10", "OM_ACCEPT_LOSS": str(LOSS)}
    writers = [Writer(database, number, data[number::2], "drop") for number in range(2)]

    with busy(database, writers):
        killed_when(database, UP, env, f"SELECT to_regclass('{TABLE}_v_kept') IS NOT NULL")
        cut_over(database, "drop", env)
        killed_when(database, DOWN, env, f"SELECT count(v_bytea) > 300 FROM {TABLE}")
        undo(database, env)
        wait(writers, [writer.writes for writer in writers])

    still: Values = {(row.id, row.sector): row.v for row in BAD}
    assert bytes_of(database) == still | {key: v for writer in writers for key, v in writer.rows.items()}
    assert mismatches(database) == []
