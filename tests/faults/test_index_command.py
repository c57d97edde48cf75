"""`openmemory-migrations index` killed at any statement: a valid index serves searches, and the next run ends it."""

from __future__ import annotations

import random
import signal
from collections.abc import Mapping
from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.cases import exhaustive
from tests.support.commands import om, result, start_om
from tests.support.databases import Databases
from tests.support.index_builds import (
    AS_HNSW,
    HNSW,
    NEW,
    OLD,
    SNAPSHOT,
    always_searchable,
    as_ivfflat,
    at_head,
    oid,
    table,
)
from tests.support.interruption import FIRST, killed
from tests.support.openmemory import Database
from tests.support.proxy import Verdict, proxy
from tests.support.running import transaction
from tests.support.sessions import eventually, sessions
from tests.support.states import INDEX, indexes

__all__ = ["table"]  # a fixture

COMMANDS: Mapping[str, tuple[tuple[str, ...], Mapping[str, str], str]] = {
    "another": (("index",), HNSW, AS_HNSW),
    "anew": (("index", "--rebuild"), {}, as_ivfflat(2)),
}
POINTS = 4


def assert_ends_well(database: Database, command: str) -> None:
    """Old or new, one is valid under its name; the same command once more ends it, and leaves nothing else."""
    args, env, wanted = COMMANDS[command]
    before = indexes(database)
    assert before[INDEX] in ((as_ivfflat(2), True), (wanted, True))
    assert set(before) <= {INDEX, NEW, OLD}
    again = om(database, *args, env=env)
    assert again.returncode == 0, again.log
    assert indexes(database) == {INDEX: (wanted, True)}
    assert sessions(database) == 0


@pytest.mark.parametrize(
    ("statement", "verdict"),
    [
        ("RENAME TO", "after"),
        *(
            pytest.param(statement, verdict, marks=pytest.mark.slow)
            for statement, verdict in [
                ("CREATE INDEX", "before"),
                ("CREATE INDEX", "after"),
                ("RENAME TO", "before"),
                ("DROP INDEX", "before"),
                ("DROP INDEX", "after"),
            ]
        ),
    ],
)
def test_killed_at_a_statement(server: embedded.Server, table: Database, statement: str, verdict: Verdict) -> None:
    args, env, _ = COMMANDS["another"]
    killed(server, table, args, lambda _, text: verdict if statement in text else None, env, start_om)
    assert_ends_well(table, "another")


@pytest.fixture(scope="module")
def numbers(server: embedded.Server, databases: Databases) -> Mapping[str, range]:
    """Those of the statements that an undisturbed run of each command sends after it has its lock."""
    found = {}
    for command, (args, env, _) in COMMANDS.items():
        with databases.copy(at_head) as database, proxy(server) as between:
            assert om(between.to(database), *args, env=env).returncode == 0
        first = next(i for i, text in enumerate(between.statements, 1) if FIRST in text)
        found[command] = range(first, len(between.statements) - 1)  # its last few vary
    return found


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("point", range(POINTS))
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_a_random_point(
    server: embedded.Server, table: Database, numbers: Mapping[str, range], command: str, point: int
) -> None:
    chosen = random.Random(f"{command} {point}")
    # one in each part of the run
    number = numbers[command][int((point + chosen.random()) / POINTS * len(numbers[command]))]
    verdict: Verdict = chosen.choice(["before", "after"])
    print(f"killed {verdict} statement {number} of {numbers[command]}")
    args, env, _ = COMMANDS[command]

    killed(server, table, args, lambda seen, _: verdict if seen == number else None, env, start_om)

    assert_ends_well(table, command)


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["CREATE INDEX", "RENAME TO", "DROP INDEX"])
@pytest.mark.parametrize("command", ["another", exhaustive("anew")])
def test_a_network_that_fails_is_survived(
    server: embedded.Server, table: Database, command: str, statement: str
) -> None:
    args, env, wanted = COMMANDS[command]
    failed = False

    def watch(text: str) -> Verdict:
        nonlocal failed
        now = not failed and statement in text
        failed = failed or now
        return "after" if now else None

    before = oid(table)
    with proxy(server, watch) as between, always_searchable(table):
        done = om(between.to(table), *args, env=env)

    assert failed
    assert done.returncode == 0, done.log
    assert "the connection was lost" in done.stderr
    assert indexes(table) == {INDEX: (wanted, True)}
    assert oid(table) != before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_in_the_build_leaves_the_index_that_was_there(table: Database, number: signal.Signals) -> None:
    args, env, _ = COMMANDS["another"]
    with transaction(table, *SNAPSHOT) as other, always_searchable(table):
        process = start_om(table, *args, env=env)
        eventually(lambda: NEW in indexes(table))
        process.send_signal(number)
        stopped = result(process)
        assert stopped.returncode not in (0, None), stopped.log
        assert "Traceback" not in stopped.log
        assert indexes(table) == {INDEX: (as_ivfflat(2), True)}
        other.rollback()
    assert_ends_well(table, "another")


@pytest.mark.slow
def test_a_signal_while_the_old_one_is_dropped_leaves_the_new_one(table: Database) -> None:
    args, env, wanted = COMMANDS["another"]
    process = None
    try:
        # what has read the table by the old index keeps it from going, and not the new one from being built
        with always_searchable(table), closing(table.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(f"BEGIN; SELECT FROM {TABLE} LIMIT 1")
            process = start_om(table, *args, env=env)
            eventually(lambda: OLD in indexes(table) and not indexes(table)[OLD][1])
            process.send_signal(signal.SIGINT)
            stopped = result(process)
            assert stopped.returncode != 0
            assert indexes(table)[INDEX] == (wanted, True)
    finally:
        if process:
            process.kill()
    assert_ends_well(table, "another")
