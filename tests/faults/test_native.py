"""A `v` that gets its dimensions, killed at any statement: the same command again ends as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.cases import exhaustive
from tests.support.commands import alembic, result, start_alembic
from tests.support.databases import Databases
from tests.support.interruption import (
    FIRST,
    STEPS,
    TO_BASE,
    TO_HEAD,
    assert_survives_kills,
    kill,
    killed,
    wait_until_gone,
)
from tests.support.native import create_newer, end, typed, wrong
from tests.support.openmemory import Database, create_database, drop_database, random_rows
from tests.support.proxy import Verdict, proxy
from tests.support.servers import OPTIONS, programs
from tests.support.sessions import eventually

pytestmark = pytest.mark.slow

DIM = 8
DATA = random_rows(3_000, DIM)
SLOWLY = {"BACKFILL_BATCH": "50"}  # some 60 batches
TO_EXPAND, TO_BACKFILL = STEPS[:2]
Ends = Mapping[tuple[str, str], object]
# what comes before the next look at a state that is another
STATEMENTS = [
    (TO_EXPAND, "ADD COLUMN"),
    (TO_EXPAND, "CREATE TRIGGER"),
    (TO_EXPAND, "COMMIT"),
    (TO_BACKFILL, "UPDATE ONLY"),
    (TO_BACKFILL, "IS DISTINCT FROM"),
    (TO_BACKFILL, "NOT VALID"),
    (TO_BACKFILL, "VALIDATE"),
    (TO_BACKFILL, "DROP COLUMN"),
    (TO_BACKFILL, "RENAME COLUMN"),
    (TO_BACKFILL, "DROP CONSTRAINT"),
    (TO_BACKFILL, "UPDATE public.openmemory_alembic_version"),
    (TO_HEAD, "CREATE INDEX"),
    (TO_BASE, "DROP INDEX"),
    (TO_BASE, "TYPE"),
    (TO_BASE, "DELETE FROM public.openmemory_alembic_version"),
]


def filled(database: Database) -> Database:
    create_newer(database, DATA)
    database.run(f"ALTER TABLE {TABLE} ALTER v SET NOT NULL")
    return database


@pytest.fixture
def table(database: Database) -> Database:
    return filled(database)


@pytest.fixture(scope="module")
def undisturbed(server: embedded.Server) -> tuple[Ends, Mapping[tuple[str, str], tuple[int, int]]]:
    """What each step leaves, and the numbers of its first statement that does something and of its last."""
    database = filled(create_database(server, "newer_undisturbed"))
    ends, lengths = {}, {}
    for command in (TO_EXPAND, TO_BACKFILL, TO_HEAD, TO_BASE):
        with proxy(server) as between:
            alembic(between.to(database), *command, env=SLOWLY)
        first = next(i for i, text in enumerate(between.statements, 1) if FIRST in text)
        lengths[command] = (first, len(between.statements))
        ends[command] = end(database)
        assert wrong(database, DATA) == []
    drop_database(server, database.name)
    return ends, lengths


def prepare(database: Database, command: tuple[str, str]) -> None:
    """Bring the table to where the command starts."""
    if command == TO_BASE:
        alembic(database, *TO_HEAD)
    elif command != TO_EXPAND:
        alembic(database, *(TO_EXPAND if command == TO_BACKFILL else TO_BACKFILL))


def assert_ends_well(database: Database, command: tuple[str, str], ends: Ends) -> None:
    assert wrong(database, DATA) == []
    alembic(database, *command)
    assert end(database) == ends[command]
    assert wrong(database, DATA) == []


@pytest.mark.exhaustive  # CI has the kills wherever it writes, below
@pytest.mark.parametrize("verdict", ["before", "after"])
@pytest.mark.parametrize(("command", "statement"), STATEMENTS, ids=lambda one: one if isinstance(one, str) else one[1])
def test_a_v_is_killed_at_a_statement(
    server: embedded.Server,
    table: Database,
    undisturbed: tuple[Ends, object],
    command: tuple[str, str],
    statement: str,
    verdict: Verdict,
) -> None:
    prepare(table, command)
    ends, _ = undisturbed

    killed(server, table, command, lambda _, text: verdict if statement in text else None)

    assert_ends_well(table, command, ends)


def start_of(database: Database, command: tuple[str, str]) -> None:
    prepare(filled(database), command)


@pytest.mark.parametrize("command", [exhaustive(TO_EXPAND), TO_BACKFILL, exhaustive(TO_HEAD), TO_BASE], ids=" ".join)
def test_a_v_is_killed_wherever_it_is_written(databases: Databases, command: tuple[str, str]) -> None:
    assert_survives_kills(databases, start_of, (command,), command, end, {"BACKFILL_BATCH": "1000"})


@pytest.mark.exhaustive
@pytest.mark.parametrize("point", range(6))
@pytest.mark.parametrize("command", [TO_EXPAND, TO_BACKFILL, TO_HEAD, TO_BASE], ids=" ".join)
def test_a_v_is_killed_at_a_random_point(
    server: embedded.Server,
    table: Database,
    undisturbed: tuple[Ends, Mapping[tuple[str, str], tuple[int, int]]],
    command: tuple[str, str],
    point: int,
) -> None:
    ends, lengths = undisturbed
    chosen = random.Random(f"newer {command} {point}")
    first, last = lengths[command]
    number = chosen.randrange(first, last - 2)
    verdict: Verdict = chosen.choice(["before", "after"])
    print(f"killed {verdict} statement {number} of {last}")
    prepare(table, command)

    killed(server, table, command, lambda seen, _: verdict if seen == number else None, SLOWLY)

    assert_ends_well(table, command, ends)


def test_killed_in_the_middle_and_taken_back(table: Database) -> None:
    before = end(table)
    process = start_alembic(table, "upgrade", "head", env=SLOWLY | {"OM_BACKFILL_PAUSE_MS": "20"})
    eventually(lambda: typed(table) > len(DATA) * 0.3)
    kill(process)
    wait_until_gone(table)
    assert 0 < typed(table) < len(DATA)

    alembic(table, "downgrade", "base")

    assert wrong(table, DATA) == []
    assert (before[0], []) == end(table)  # type: ignore[index]


@pytest.mark.parametrize("run", ["waits for it", "is killed"])
def test_the_server_crashes_in_the_middle(undisturbed: tuple[Ends, object], run: str) -> None:
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        table = filled(create_database(server, "crash"))
        process = start_alembic(table, "upgrade", "head", env=SLOWLY | {"OM_BACKFILL_PAUSE_MS": "20"})
        eventually(lambda: typed(table) > len(DATA) * 0.3)
        server.stop("immediate")
        if run == "is killed":
            kill(process)
        server.start()

        if run == "is killed":
            assert 0 < typed(table) < len(DATA)
            alembic(table, "upgrade", "head")
        else:
            ended = result(process)
            assert ended.returncode == 0, ended.log
        assert end(table) == undisturbed[0][TO_HEAD]
        assert wrong(table, DATA) == []
