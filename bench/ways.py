"""One way from `v` to `v_vector`, in a process of its own: `python -m bench.ways NAME URL DIMENSIONS MOST_ROWS`.

Prints the rows converted, the seconds that it took without start and preparation, and the peak resident
size of the process in KiB.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psycopg2
from psycopg2.extras import execute_values

from demo.openmemory import Database, environment

ROOT = Path(__file__).parent.parent
NOTHING: Mapping[str, str] = {}
PAGE = 1000
NEXT = """
SELECT id, sector, v FROM openmemory_vectors WHERE (id, sector) > (%s, %s) ORDER BY id, sector LIMIT %s
"""
COLUMN = "CREATE EXTENSION IF NOT EXISTS vector; ALTER TABLE openmemory_vectors ADD v_vector vector({dimensions})"
FLOOR_COLUMN = """
ALTER TABLE openmemory_vectors ADD copy bytea;
ALTER TABLE openmemory_vectors ALTER copy SET STORAGE EXTERNAL
"""


def floor(url: str, most: int) -> int:
    """What the server needs by itself to write as many bytes into another column of the same table."""
    return _execute(url, "UPDATE openmemory_vectors SET copy = v || ''")


def row_by_row(url: str, most: int) -> int:
    """The old tool: pages by OFFSET, an UPDATE with a text literal for each row, autocommit.

    Its OFFSET skips half of the rows; the rate is that of the rows which it does convert.
    """
    done = 0
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        for page in count():
            cursor.execute(
                "SELECT id, sector, v FROM openmemory_vectors WHERE v_vector IS NULL LIMIT %s OFFSET %s",
                (PAGE, page * PAGE),
            )
            rows = cursor.fetchall()
            if not rows or done >= most:
                return done
            for id, sector, v in rows:
                cursor.execute(
                    "UPDATE openmemory_vectors SET v_vector = %s::vector WHERE id = %s AND sector = %s",
                    (_text(v), id, sector),
                )
            done += len(rows)
    raise AssertionError


def values(url: str, most: int) -> int:
    """execute_values with text literals, a thousand rows a statement and a commit."""
    with closing(psycopg2.connect(url)) as connection:
        return _by_key(
            connection,
            most,
            lambda cursor, rows: execute_values(
                cursor,
                "UPDATE openmemory_vectors AS t SET v_vector = d.v FROM (VALUES %s) AS d (id, sector, v)"
                " WHERE t.id = d.id AND t.sector = d.sector",
                [(id, sector, _text(v)) for id, sector, v in rows],
                template="(%s::uuid, %s, %s::vector)",
                page_size=PAGE,
            ),
        )


def pgvector_python(url: str, most: int) -> int:
    """pgvector-python's register_vector on psycopg 3, executemany, a thousand rows a commit."""
    import psycopg
    from pgvector.psycopg import register_vector

    with psycopg.connect(url) as connection:
        register_vector(connection)
        return _by_key(
            connection,
            most,
            lambda cursor, rows: cursor.executemany(
                "UPDATE openmemory_vectors SET v_vector = %s WHERE id = %s AND sector = %s",
                [(np.frombuffer(v, "<f4"), id, sector) for id, sector, v in rows],
            ),
        )


def _by_key(connection: Any, most: int, write: Callable[[Any, list[tuple[str, str, bytes]]], object]) -> int:
    """Pages by the primary key, a commit each; the cursors of psycopg2 and psycopg agree in all that is used here."""
    done, last = 0, ("00000000-0000-0000-0000-000000000000", "")
    with connection.cursor() as cursor:
        while done < most:
            cursor.execute(NEXT, (*last, PAGE))
            rows = cursor.fetchall()
            if not rows:
                break
            write(cursor, rows)
            connection.commit()
            done, last = done + len(rows), rows[-1][:2]
    return done


def _text(v: bytes) -> str:
    return "[" + ",".join(map(str, np.frombuffer(v, "<f4").tolist())) + "]"


def ours(url: str, most: int) -> int:
    """The backfill's revision, as `alembic upgrade` runs it."""
    from alembic import command
    from alembic.config import Config

    config = Config(str(ROOT / "alembic.ini"))
    command.upgrade(config, "om_20240107_backfill")
    return -1


def script(url: str, most: int) -> int:
    """The backfill's offline script, in psql."""
    sql = _alembic("upgrade", "om_20240107_pgvector:om_20240107_backfill", "--sql")
    psql = os.environ["BENCH_PSQL"]
    subprocess.run([psql, "-Xq", "-v", "ON_ERROR_STOP=1", url], input=sql, text=True, check=True, capture_output=True)
    return -1


def _alembic(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *command], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout


def _execute(url: str, sql: str) -> int:
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(sql)
        return cursor.rowcount


# the name in the table, what runs, and what is prepared first
WAYS: dict[str, tuple[Callable[[str, int], int], str | None, dict[str, str]]] = {
    "floor": (floor, FLOOR_COLUMN, {}),
    "row by row": (row_by_row, COLUMN, {}),
    "execute_values": (values, COLUMN, {}),
    "pgvector-python": (pgvector_python, COLUMN, {}),
    "ours": (ours, None, {}),
    "ours, 2 workers": (ours, None, {"OM_BACKFILL_WORKERS": "2"}),
    "ours, client engine": (ours, None, {"OM_BACKFILL_ENGINE": "client"}),
    "ours, client engine, 2 workers": (ours, None, {"OM_BACKFILL_ENGINE": "client", "OM_BACKFILL_WORKERS": "2"}),
    "ours, server engine": (ours, None, {"OM_BACKFILL_ENGINE": "server"}),
    "ours, script": (script, None, {}),
    "ours, script, server engine": (script, None, {"OM_BACKFILL_ENGINE": "server"}),
}


def run(
    database: Database, name: str, dimensions: int, most: int = sys.maxsize, settings: Mapping[str, str] = NOTHING
) -> dict[str, float]:
    """Takes one way in a process of its own and returns what that prints."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.ways", name, database.url, str(dimensions), str(most)],
        env=environment(None, settings),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return dict(json.loads(done.stdout))


def main(name: str, url: str, dimensions: str, most: str) -> None:
    way, preparation, settings = WAYS[name]
    os.environ.update({"OM_DATABASE_URL": url, "OM_VEC_DIM": dimensions, **settings})
    if preparation:
        _execute(url, preparation.format(dimensions=dimensions))
    else:
        _alembic("upgrade", "om_20240107_pgvector")
    for name in ("alembic.command", "openmemory_migrations.ops"):
        importlib.import_module(name)  # what they take to load isn't counted
    _execute(url, "CHECKPOINT")
    started = time.perf_counter()
    rows = way(url, int(most))
    taken = time.perf_counter() - started
    if rows < 0 and "BENCH_NO_COUNT" not in os.environ:
        with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(v_vector) FROM openmemory_vectors")
            (rows,) = cursor.fetchone() or (0,)
    print(json.dumps({"rows": rows, "seconds": taken, "peak_kib": peak_kib()}))


def peak_kib() -> int:
    # not getrusage(): a new process begins with the peak of the one that has started it
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
