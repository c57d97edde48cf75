"""What the tests of interrupted runs share: a table big enough to have a middle, and the ends that are right."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
from collections.abc import Mapping

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded

from .helpers import (
    Database,
    Result,
    alembic,
    create_database,
    create_table,
    drop_database,
    load,
    mismatches,
    random_rows,
)
from .online import converted, sessions, wait_until
from .states import BACKFILL, EXPAND, HEAD, State, snapshot, stamp

ROWS, DIM = 12_000, 32
DATA = random_rows(ROWS, DIM)
SLOWLY: Mapping[str, str] = {"BACKFILL_BATCH": "50"}  # 240 batches and commits, more than a second
End = tuple[State, list[str] | None]
Ends = Mapping[tuple[str, str], End]
TO_HEAD, TO_BASE = ("upgrade", HEAD), ("downgrade", "base")
STEPS = [("upgrade", EXPAND), ("upgrade", BACKFILL), TO_HEAD, ("downgrade", BACKFILL), ("downgrade", EXPAND), TO_BASE]


@pytest.fixture(scope="module")
def ends(server: embedded.Server) -> Ends:
    """What each step leaves when nothing disturbs it."""
    return _undisturbed(server)


@functools.cache  # for more than one module
def _undisturbed(server: embedded.Server) -> Ends:
    database = filled(create_database(server, "undisturbed"))
    found = {}
    for command in STEPS:
        alembic(database, *command)
        found[command] = end(database)
        if command == TO_HEAD:
            assert mismatches(database) == []
    assert found[STEPS[1]] == found[STEPS[3]]
    drop_database(server, database.name)
    return found


@pytest.fixture
def table(database: Database) -> Database:
    return filled(database)


def filled(database: Database) -> Database:
    create_table(database)
    load(database, DATA)
    return database


def end(database: Database) -> End:
    return snapshot(database), stamp(database)


def life_cycle(database: Database, ends: Ends) -> None:
    """Down to the base and up to the head, or the other way round, each as if nothing had ever happened."""
    for command in (TO_BASE, TO_HEAD) if stamp(database) == [HEAD] else (TO_HEAD, TO_BASE):
        alembic(database, *command)
        assert end(database) == ends[command]


def in_the_middle(database: Database) -> bool:
    return converted(database) > ROWS * 0.3


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended already"
    process.communicate()


def result(process: subprocess.Popen[str]) -> Result:
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    return Result(process.returncode, stdout, stderr)


def gone(database: Database) -> bool:
    return not sessions(database)


def wait_until_gone(database: Database) -> None:
    wait_until(lambda: gone(database), 5)


def done(database: Database) -> set[tuple[str, ...]]:
    """Which versions of which rows have their vector."""
    return set(database.rows(f"SELECT id, sector, xmin::text FROM {TABLE} WHERE v_vector IS NOT NULL"))


def reported(log: str) -> int:
    """The rows that a run converted, by its own account at its end."""
    counts = re.findall(rf"backfill {TABLE}: ([\d,]+) of ([\d,]+) rows \(100 %\)", log)
    assert counts, log
    assert all(count == of for count, of in counts)
    return sum(int(count.replace(",", "")) for count, _ in counts)


def assert_carries_on(database: Database, ends: Ends) -> None:
    """Some rows are done, not all; the plain re-run converts the others only, and all is as it should be."""
    before = done(database)
    assert 0.2 * ROWS < len(before) < 0.8 * ROWS
    again = alembic(database, "upgrade", "head")
    assert reported(again.log) == ROWS - len(before)
    assert before <= done(database), "a row was converted twice"
    assert mismatches(database) == []
    assert end(database) == ends[TO_HEAD]
