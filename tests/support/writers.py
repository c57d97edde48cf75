"""The application at full speed: threads that write as OpenMemory does, and remember what they have written."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from psycopg2.extensions import cursor as Cursor

from demo.openmemory import TABLE
from tests.support.openmemory import SECTORS, Database, Row, pack, random_rows

# OpenMemory's own
UPSERT = f"""
INSERT INTO {TABLE} (id, sector, user_id, v, dim) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (id, sector) DO UPDATE SET user_id = EXCLUDED.user_id, v = EXCLUDED.v, dim = EXCLUDED.dim
"""
Key = tuple[str, str]


class Writer(threading.Thread):
    """Rows of its own, so that it knows what each of them has to hold in the end."""

    def __init__(self, database: Database, number: int, rows: Sequence[Row]) -> None:
        super().__init__(name=f"writer {number}", daemon=True)
        self.rows: dict[Key, bytes | None] = {(row.id, row.sector): row.v for row in rows}
        self.writes = 0
        self.longest_wait = 0.0
        self.error: BaseException | None = None
        self.stopping = threading.Event()
        self._database, self._dim = database, rows[0].dim
        self._keys = list(self.rows)
        self._random = random.Random(number)
        self._good = [row.v for row in random_rows(500, self._dim, seed=100 + number)]
        self._bad = [pack([float("nan")] * self._dim), pack([1.0] * (self._dim + 1)), pack([1.0]), b"\1\2\3", b""]

    def run(self) -> None:
        try:
            with closing(self._database.connect()) as connection, connection.cursor() as cursor:
                while not self.stopping.is_set():
                    self._write(cursor)
        except BaseException as error:
            self.error = error

    def _write(self, cursor: Cursor) -> None:
        key = self._random.choice(self._keys)
        (kind,) = self._random.choices(
            [self._upsert, self._remember, self._update_v, self._update_user, self._forget], [30, 5, 30, 25, 10]
        )
        kind(cursor, key)
        self.writes += 1

    def _upsert(self, cursor: Cursor, key: Key) -> None:
        v = self._value()
        self._timed(cursor, UPSERT, *key, "user1", v, self._dim)
        self.rows[key] = v

    def _remember(self, cursor: Cursor, _: Key) -> None:
        """One memory with its five sectors, in one transaction."""
        id = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
        keys = [(id, sector) for sector in SECTORS]
        cursor.execute("BEGIN")
        for key in keys:
            self._upsert(cursor, key)
        # once more, in another order, as its update would
        for key in self._random.sample(keys, 5):
            self._upsert(cursor, key)
        cursor.execute("COMMIT")
        self._keys += keys

    def _update_v(self, cursor: Cursor, key: Key) -> None:
        v = self._value()
        self._timed(cursor, f"UPDATE {TABLE} SET v = %s WHERE id = %s AND sector = %s", v, *key)
        if key in self.rows:
            self.rows[key] = v

    def _update_user(self, cursor: Cursor, key: Key) -> None:
        user = f"user{self._random.randrange(20)}"
        self._timed(cursor, f"UPDATE {TABLE} SET user_id = %s WHERE id = %s AND sector = %s", user, *key)

    def _forget(self, cursor: Cursor, key: Key) -> None:
        self._timed(cursor, f"DELETE FROM {TABLE} WHERE id = %s AND sector = %s", *key)
        self.rows.pop(key, None)

    def _value(self) -> bytes | None:
        return self._random.choice(self._bad if self._random.random() < 0.05 else self._good)

    def _timed(self, cursor: Cursor, sql: str, *values: object) -> None:
        started = time.monotonic()
        cursor.execute(sql, values)
        self.longest_wait = max(self.longest_wait, time.monotonic() - started)


@contextmanager
def writing(
    database: Database, rows: Sequence[Row], writers: int = 4, kind: type[Writer] = Writer
) -> Iterator[list[Writer]]:
    """Let writers at the rows, each at its share; they have stopped, without an error, when this is left."""
    threads = [kind(database, number, rows[number::writers]) for number in range(writers)]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        for thread in threads:
            thread.stopping.set()
        for thread in threads:
            thread.join(60)
    assert [thread.error for thread in threads] == [None] * writers
    assert not any(thread.is_alive() for thread in threads)


def written(writers: list[Writer]) -> int:
    return sum(writer.writes for writer in writers)


def v_of(database: Database) -> dict[Key, bytes | None]:
    rows = database.rows(f"SELECT id, sector, v FROM {TABLE}")
    return {(id, sector): v if v is None else bytes(v) for id, sector, v in rows}


def remembered(writers: list[Writer]) -> dict[Key, bytes | None]:
    return {key: v for writer in writers for key, v in writer.rows.items()}
