"""Index builds that wait for others, or were interrupted."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

import psycopg2
import pytest

from demo.openmemory import TABLE
from tests.support.commands import NOTHING, Result, alembic, om
from tests.support.databases import Databases
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.running import OURS, transaction
from tests.support.states import INDEX, nearest

ROWS, DIM = 2_500, 16


NEW, OLD = f"{INDEX}_new", f"{INDEX}_old"


HNSW = {"OM_INDEX": "hnsw"}


ON = f"CREATE INDEX {INDEX} ON public.{TABLE} USING "


AS_HNSW = f"{ON}hnsw (v_vector vector_l2_ops) WITH (m='16', ef_construction='64')"


def as_ivfflat(lists: int) -> str:
    return f"{ON}ivfflat (v_vector) WITH (lists='{lists}')"


def at_head(database: Database) -> None:
    create_table(database)
    load(database, random_rows(ROWS, DIM))
    alembic(database, "upgrade", "head")


@pytest.fixture
def table(databases: Databases) -> Iterator[Database]:
    """At the head, with an ivfflat index of two lists."""
    with databases.copy(at_head) as database:
        yield database


def index(database: Database, *args: str, env: Mapping[str, str] = NOTHING, code: int = 0) -> Result:
    done = om(database, "index", *args, env=env)
    assert done.returncode == code, done.log
    assert "Traceback" not in done.log
    return done


def oid(database: Database) -> int | None:
    found: int | None = database.value("SELECT to_regclass(%s)::oid", INDEX)
    return found


@contextmanager
def always_searchable(database: Database) -> Iterator[list[set[str]]]:
    """See that a search uses an index whenever it looks; gives the names that it has seen, in order."""
    seen: list[set[str]] = []
    failures: list[str] = []
    over = threading.Event()

    def search() -> None:
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("SET enable_seqscan = off")
            while not over.wait(0.002):
                cursor.execute(f"EXPLAIN (COSTS OFF) SELECT id FROM {TABLE} {nearest(DIM)} LIMIT 5")
                shown = "\n".join(line for (line,) in cursor)
                used = set(re.findall(r"Index Scan using (\S+)", shown))
                if "Seq Scan" in shown or not used:
                    failures.append(shown)
                if not seen or seen[-1] != used:
                    seen.append(used)

    reader = threading.Thread(target=search)
    reader.start()
    try:
        yield seen
    finally:
        over.set()
        reader.join()
    assert not failures, failures[0]


SNAPSHOT = ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT FROM pg_class LIMIT 1"]


READER = [*SNAPSHOT, f"SELECT FROM {TABLE} LIMIT 1"]


BUILDING = f"{OURS} AND query ~ '^CREATE INDEX' AND wait_event_type = 'Lock'"


def build_waits(database: Database, seconds: float = 0) -> bool:
    """Tell whether the index build has begun so long ago and waits for a transaction."""
    age = "clock_timestamp() - query_start > make_interval(secs => %s)"
    return bool(database.rows(f"SELECT FROM pg_stat_activity WHERE {BUILDING} AND {age}", seconds))


def leave_invalid(database: Database, name: str, on: str) -> None:
    """Leave the index of a build that was cancelled."""
    with transaction(database, *SNAPSHOT), closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '50ms'")
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            cursor.execute(f"CREATE INDEX CONCURRENTLY {name} ON {on}")
    assert not database.value("SELECT indisvalid FROM pg_index WHERE indexrelid = %s::regclass", name)
