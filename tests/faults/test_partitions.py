"""A tree whose migration is killed, up or down, wherever it is: the same command again ends as if nothing had been."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import alembic, start_alembic
from tests.support.index_builds import SNAPSHOT, build_waits
from tests.support.interruption import TO_BASE, TO_HEAD, End, end, kill, killed, reported, wait_until_gone
from tests.support.openmemory import Database, checksum, create_database, drop_database, mismatches
from tests.support.partitions import LEAVES, ROWS, SLOW, assert_migrated, filled, tree, vector_indexes
from tests.support.proxy import Verdict
from tests.support.running import running, transaction
from tests.support.sessions import converted, eventually, terminate
from tests.support.states import BACKFILL, EXPAND

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

__all__ = ["tree"]  # a fixture

Ends = dict[tuple[str, str], End]
ON_ONLY, BUILD, ATTACH = " ON ONLY ", "CREATE INDEX CONCURRENTLY", " ATTACH PARTITION "


@pytest.fixture(scope="module")
def ends(server: embedded.Server) -> Iterator[Ends]:
    """What the way up and the way down leave when nothing disturbs them."""
    database = filled(create_database(server, "undisturbed tree"))
    found = {}
    for command in (TO_HEAD, TO_BASE):
        alembic(database, *command)
        found[command] = end(database)
    yield found
    drop_database(server, database.name)


def assert_ends_well(database: Database, command: tuple[str, str], ends: Ends) -> None:
    """The command again, the way back, and the way there: all as undisturbed."""
    for one in (command, TO_BASE if command == TO_HEAD else TO_HEAD):
        alembic(database, *one)
        assert end(database) == ends[one]


def nth(statement: str, number: int, verdict: Verdict) -> Callable[[int, str], Verdict]:
    seen = 0

    def when(_: int, text: str) -> Verdict:
        nonlocal seen
        seen += statement in text
        return verdict if statement in text and seen == number else None

    return when


@pytest.mark.parametrize("engine", ["client", pytest.param("server", marks=pytest.mark.slow)])
def test_killed_in_the_backfill(tree: Database, ends: Ends, engine: str) -> None:
    v = checksum(tree)
    process = start_alembic(tree, *TO_HEAD, env={**SLOW, "OM_BACKFILL_ENGINE": engine})
    share = random.uniform(0.1, 0.8)
    eventually(lambda: converted(tree) > share * len(ROWS))
    kill(process)
    wait_until_gone(tree)
    versions = f"SELECT id, sector, xmin::text FROM {TABLE} WHERE v_vector IS NOT NULL"
    done = set(tree.rows(versions))

    again = alembic(tree, *TO_HEAD, env={"OM_BACKFILL_ENGINE": engine})

    assert reported(again.log) == len(ROWS) - len(done) > 0
    assert done <= set(tree.rows(versions)), "a row was converted twice"
    assert mismatches(tree) == []
    assert checksum(tree) == v
    assert_ends_well(tree, TO_HEAD, ends)


KILLS = [
    (TO_HEAD, ON_ONLY, 1, "before"),
    (TO_HEAD, ON_ONLY, 1, "after"),
    (TO_HEAD, ON_ONLY, 3, "after"),
    (TO_HEAD, BUILD, 1, "before"),
    (TO_HEAD, BUILD, 4, "after"),
    (TO_HEAD, ATTACH, 1, "before"),
    (TO_HEAD, ATTACH, 5, "after"),
    (TO_BASE, "DROP INDEX", 1, "before"),
    (TO_BASE, "DROP INDEX", 1, "after"),
    (TO_BASE, "DROP COLUMN", 1, "before"),
    (TO_BASE, "DROP COLUMN", 1, "after"),
]
QUICK = (1, 8)


@pytest.mark.parametrize(
    ("command", "statement", "number", "verdict"),
    [
        pytest.param(*case, marks=[] if i in QUICK else pytest.mark.slow, id=" ".join(map(str, case[1:])))
        for i, case in enumerate(KILLS)
    ],
)
def test_killed_at_a_statement(
    server: embedded.Server,
    tree: Database,
    ends: Ends,
    command: tuple[str, str],
    statement: str,
    number: int,
    verdict: Verdict,
) -> None:
    alembic(tree, "upgrade", BACKFILL if command == TO_HEAD else "head")

    killed(server, tree, command, nth(statement, number, verdict))

    assert_ends_well(tree, command, ends)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("command", [TO_HEAD, TO_BASE], ids=["up", "down"])
@pytest.mark.parametrize("_", range(4))
def test_killed_anywhere(
    server: embedded.Server,
    tree: Database,
    ends: Ends,
    command: tuple[str, str],
    _: int,
    record_property: Callable[[str, object], None],
) -> None:
    alembic(tree, "upgrade", BACKFILL if command == TO_HEAD else "head")
    number = random.randint(20, 150)
    verdict: Verdict = random.choice(["before", "after"])
    record_property("statement", (number, verdict))
    statements = 0

    def when(seen: int, text: str) -> Verdict:
        nonlocal statements
        statements = seen
        return verdict if seen == number else None

    killed(server, tree, command, when)

    assert_ends_well(tree, command, ends)


@pytest.mark.parametrize(
    "server_too",
    [pytest.param(True, id="and its session"), pytest.param(False, id="alone", marks=pytest.mark.slow)],
)
def test_killed_in_the_middle_of_a_build(tree: Database, ends: Ends, server_too: bool) -> None:
    alembic(tree, "upgrade", BACKFILL)
    with transaction(tree, *SNAPSHOT) as other, running(tree, *TO_HEAD) as run:
        eventually(lambda: build_waits(tree))
        run.kill()
        if server_too:
            assert terminate(tree)
            wait_until_gone(tree)
        other.rollback()
    wait_until_gone(tree)
    states = [valid for part in LEAVES for valid, _, _ in vector_indexes(tree)[part]]
    assert states == [not server_too]

    log = alembic(tree, *TO_HEAD).stderr

    assert ("is invalid, left by a build that was interrupted; dropping it" in log) == server_too
    assert_migrated(tree)
    assert_ends_well(tree, TO_HEAD, ends)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param("", id="leaf", marks=pytest.mark.slow),
        pytest.param(" PARTITION BY HASH (id)", id="nested"),
    ],
)
def test_a_partition_made_between_a_kill_in_the_build_and_the_next_run(
    server: embedded.Server, tree: Database, parts: str
) -> None:
    alembic(tree, "upgrade", BACKFILL)
    killed(server, tree, TO_HEAD, nth(BUILD, 2, "before"))
    tree.run(f"CREATE TABLE late PARTITION OF {TABLE} FOR VALUES IN ('late'){parts}")
    if parts:
        tree.run("CREATE TABLE later PARTITION OF late FOR VALUES WITH (MODULUS 1, REMAINDER 0)")

    alembic(tree, *TO_HEAD)

    assert_migrated(tree)
    alembic(tree, "downgrade", BACKFILL)
    assert not any(vector_indexes(tree).values())


def test_the_locks_of_all_partitions_are_waited_for_no_longer_than_that_of_one(tree: Database) -> None:
    """Each is let go before a lock_timeout is over, and whoever writes waits for all of them."""
    waiting = "SELECT CAST(CAST(relation AS regclass) AS text) FROM pg_locks WHERE NOT granted AND relation IS NOT NULL"
    with ExitStack() as stack:
        readers = {
            leaf: stack.enter_context(transaction(tree, f"LOCK TABLE {leaf} IN ACCESS SHARE MODE"))
            for leaf in LEAVES[:4]
        }
        with running(tree, "upgrade", EXPAND, env={"OM_LOCK_TIMEOUT_MS": "1000"}) as run:
            while readers:
                eventually(lambda: tree.rows(waiting))
                time.sleep(0.7)
                for (leaf,) in tree.rows(waiting):
                    readers.pop(leaf).rollback()
            assert run.ends() == 0

    assert "canceling statement due to statement timeout (SQLSTATE 57014), try" in run.log
