"""Every step, up and down, killed at a statement or in one: the same command again ends as if nothing had happened."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from contextlib import suppress

import pytest

from openmemory_migrations import embedded
from tests.support.commands import alembic, result, start_alembic
from tests.support.databases import Databases
from tests.support.interruption import (
    DATA,
    FIRST,
    SLOWLY,
    STEPS,
    TO_BASE,
    TO_HEAD,
    Ends,
    assert_survives_kills,
    end,
    ends,
    filled,
    holding,
    kill,
    killed,
    life_cycle,
    table,
    wait_until_gone,
    waits_for_a_lock,
)
from tests.support.openmemory import Database, create_table, load
from tests.support.proxy import Verdict, proxy
from tests.support.sessions import eventually, terminate
from tests.support.states import BACKFILL, INDEX

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

__all__ = ["ends", "table"]  # fixtures

TO_EXPAND = STEPS[0]
POINTS = 6  # for each of the six steps
FEW = {"BACKFILL_BATCH": "100"}


def prepare(database: Database, command: tuple[str, str]) -> None:
    """Bring the table to where the command starts."""
    before = STEPS[: STEPS.index(command)]
    if before and before[-1][0] == "upgrade":
        alembic(database, *before[-1])
    elif before:
        alembic(database, "upgrade", "head")
        alembic(database, *before[-1])


def assert_ends_well(database: Database, command: tuple[str, str], ends: Ends) -> None:
    alembic(database, *command)
    assert end(database) == ends[command]
    life_cycle(database, ends)


@pytest.mark.parametrize(
    ("command", "statement", "verdict"),
    [
        pytest.param(*(TO_EXPAND, "CREATE EXTENSION", "after"), marks=pytest.mark.slow),
        (TO_EXPAND, "CREATE OR REPLACE TRIGGER", "after"),
        (TO_EXPAND, "INSERT INTO public.openmemory_alembic_version", "before"),
        (TO_HEAD, "UPDATE public.openmemory_alembic_version", "before"),
        pytest.param(*(TO_BASE, "DROP FUNCTION", "after"), marks=pytest.mark.slow),
        (TO_BASE, "DELETE FROM public.openmemory_alembic_version", "before"),
    ],
)
def test_killed_at_a_statement(
    server: embedded.Server,
    table: Database,
    ends: Ends,
    command: tuple[str, str],
    statement: str,
    verdict: Verdict,
) -> None:
    prepare(table, command)
    killed(server, table, command, lambda _, text: verdict if statement in text else None)
    assert_ends_well(table, command, ends)


def few(database: Database, command: tuple[str, str]) -> None:
    """Three batches of FEW, where the command starts."""
    create_table(database)
    load(database, DATA[:300])
    prepare(database, command)


@pytest.mark.slow
@pytest.mark.parametrize("command", STEPS, ids=" ".join)
def test_killed_wherever_it_writes(databases: Databases, command: tuple[str, str]) -> None:
    assert_survives_kills(databases, few, (command,), command, end, FEW)


@pytest.fixture(scope="module")
def lengths(server: embedded.Server, databases: Databases) -> Mapping[tuple[str, str], tuple[int, int]]:
    """For each step of an undisturbed run, the numbers of the first statement that does something and of the last."""
    found = {}
    with databases.copy(filled) as database:
        for command in STEPS:
            with proxy(server) as between:
                alembic(between.to(database), *command, env=SLOWLY)
            first = next(i for i, text in enumerate(between.statements, 1) if FIRST in text)
            found[command] = (first, len(between.statements))
    return found


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("point", range(POINTS))
@pytest.mark.parametrize("command", STEPS, ids=" ".join)
def test_killed_at_a_random_point(
    server: embedded.Server,
    table: Database,
    ends: Ends,
    lengths: Mapping[tuple[str, str], tuple[int, int]],
    command: tuple[str, str],
    point: int,
) -> None:
    chosen = random.Random(f"{command} {point}")
    first, last = lengths[command]
    # one in each part of the run; its last few statements vary
    share = (point + chosen.random()) / POINTS
    number = first + int(share * (last - 2 - first))
    verdict: Verdict = chosen.choice(["before", "after"])
    print(f"killed {verdict} statement {number} of {last}")
    prepare(table, command)

    killed(server, table, command, lambda seen, _: verdict if seen == number else None, SLOWLY, surely=False)

    assert_ends_well(table, command, ends)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("point", range(2))
@pytest.mark.parametrize("command", STEPS, ids=" ".join)
def test_a_network_that_fails_at_a_random_point_is_survived(
    server: embedded.Server,
    table: Database,
    ends: Ends,
    lengths: Mapping[tuple[str, str], tuple[int, int]],
    command: tuple[str, str],
    point: int,
) -> None:
    chosen = random.Random(f"network {command} {point}")
    first, last = lengths[command]
    number = chosen.randrange(first, last - 2)
    verdict: Verdict = chosen.choice(["before", "after"])
    print(f"cut {verdict} statement {number} of {last}")
    prepare(table, command)
    seen = 0

    def watch(_: str) -> Verdict:
        nonlocal seen
        seen += 1
        return verdict if seen == number else None

    with proxy(server, watch) as between:
        alembic(between.to(table), *command, env=SLOWLY)

    assert end(table) == ends[command]
    life_cycle(table, ends)


@pytest.mark.parametrize("session", ["has ended", "still builds when the next run starts"])
def test_killed_in_the_index_build(table: Database, ends: Ends, session: str) -> None:
    alembic(table, "upgrade", BACKFILL)
    with holding(table, "ROW EXCLUSIVE"):
        process = start_alembic(table, "upgrade", "head")
        eventually(lambda: waits_for_a_lock(table, "CREATE INDEX"))
        kill(process)
        if session == "has ended":
            terminate(table)
            wait_until_gone(table)
        assert table.value("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = %s::regclass", INDEX)

        again = start_alembic(table, "upgrade", "head")
        with suppress(AssertionError):  # as it may wait in another way
            eventually(lambda: again.poll() is not None or waits_for_a_lock(table, "DROP INDEX"), 4)
    ended = result(again)

    assert ended.returncode == 0, ended.log
    assert session != "has ended" or re.search(f'"{INDEX}" is invalid.*dropping it', ended.log)
    assert end(table) == ends[TO_HEAD]
    wait_until_gone(table)
    life_cycle(table, ends)


def test_killed_in_the_index_drop(table: Database, ends: Ends) -> None:
    alembic(table, "upgrade", "head")
    with holding(table, "ACCESS SHARE"):
        process = start_alembic(table, "downgrade", BACKFILL)
        eventually(lambda: waits_for_a_lock(table, "DROP INDEX"))
        kill(process)
        terminate(table)
        wait_until_gone(table)
        assert table.value("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = %s::regclass", INDEX)

    assert_ends_well(table, ("downgrade", BACKFILL), ends)


def test_killed_while_it_waits_for_the_table(table: Database, ends: Ends) -> None:
    for command in (TO_EXPAND, TO_BASE):
        with holding(table, "ACCESS SHARE"):
            process = start_alembic(table, *command)
            eventually(lambda: waits_for_a_lock(table, ""))
            kill(process)
        wait_until_gone(table)
        alembic(table, *command)
        assert end(table) == ends[command]
    life_cycle(table, ends)
