"""What the tests of interrupted runs share: a table big enough to have a middle, and the ends that are right."""

from __future__ import annotations

import functools
import re
import signal
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import NOTHING, Process, alembic, start_alembic
from tests.support.databases import Databases
from tests.support.openmemory import (
    Database,
    create_database,
    create_table,
    drop_database,
    load,
    mismatches,
    random_rows,
)
from tests.support.proxy import Verdict, proxy
from tests.support.sessions import converted, eventually, sessions
from tests.support.states import BACKFILL, EXPAND, HEAD, State, snapshot, stamp

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


def kill(process: Process) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended already"
    process.communicate()


def gone(database: Database) -> bool:
    return not sessions(database)


def wait_until_gone(database: Database) -> None:
    eventually(lambda: gone(database), 5)


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


FIRST = "pg_try_advisory_xact_lock"  # what comes before it only connects


def killed(
    server: embedded.Server,
    database: Database,
    command: tuple[str, ...],
    when: Callable[[int, str], Verdict],
    env: Mapping[str, str] = NOTHING,
    start: Callable[..., Process] = start_alembic,
    *,
    surely: bool = True,
) -> bool:
    """Start a run and kill it at the first statement for which `when`, given its number, has a verdict.

    Not `surely`: it may have ended well before, as how often it asks for progress depends on how busy the machine is.
    Tells whether it was killed.
    """
    process: Process | None = None
    seen = 0

    def watch(statement: str) -> Verdict:
        nonlocal seen
        seen += 1
        verdict = when(seen, statement)
        if verdict:
            assert process
            process.kill()
        return verdict

    with proxy(server, watch) as between:
        process = start(between.to(database), *command, env=env)
        ended = process.wait(timeout=120) == 0 and not surely
        if ended:
            process.communicate()
        else:
            kill(process)
    wait_until_gone(database)
    return not ended


# what changes nothing by itself
_READS = re.compile(
    r"\s*(SELECT|WITH(?! gone)|SHOW|SET|RESET|BEGIN|DECLARE|FETCH|CLOSE|LOCK|SAVEPOINT|RELEASE|COPY \()", re.IGNORECASE
)
_LITERAL = re.compile(r"'[^']*'|\d+")  # what differs from run to run


def _writes(statements: Iterable[str]) -> Iterator[tuple[str, int, Verdict]]:
    """The places in a run at which a kill leaves a state of its own: statements, which of the same, before or after.

    That is before each kind of statement that changes something, after each commit of one, and after what commits by
    itself.
    """
    seen: Counter[str] = Counter()
    wrote = False
    for statement in statements:
        text = _LITERAL.sub("?", statement)
        seen[text] += 1
        if text in ("COMMIT", "ROLLBACK"):
            if wrote and text == "COMMIT":
                yield text, seen[text], "after"
            wrote = False
        elif not _READS.match(text):
            wrote = True
            if seen[text] == 1:
                yield text, 1, "before"
            if "CONCURRENTLY" in text:
                yield text, seen[text], "after"


def _nth(wanted: str, number: int, verdict: Verdict) -> Callable[[int, str], Verdict]:
    seen = 0

    def when(_: int, statement: str) -> Verdict:
        nonlocal seen
        same = _LITERAL.sub("?", statement) == wanted
        seen += same
        return verdict if same and seen == number else None

    return when


def assert_survives_kills(
    databases: Databases,
    make: Callable[..., object],
    args: tuple[Hashable, ...],
    command: tuple[str, ...],
    look: Callable[[Database], object],
    env: Mapping[str, str] = NOTHING,
) -> None:
    """Kill the command wherever it writes, each time on a copy of its own: run again it ends as if never killed."""
    with databases.copy(make, *args) as database, proxy(databases.server) as between:
        alembic(between.to(database), *command, env=env)
        wanted = look(database)
    places = list(_writes(between.statements))
    met = 0
    for place in places:
        with databases.copy(make, *args) as database:
            met += killed(databases.server, database, command, _nth(*place), env, surely=False)
            alembic(database, *command, env=env)
            assert look(database) == wanted, f"killed {place[2]} number {place[1]} of {place[0]}"
    print(f"killed at {met} of {len(places)} places")
    # the second connection's reads come in another order each time
    assert met >= 0.9 * len(places) > 0


@contextmanager
def holding(database: Database, mode: str) -> Iterator[None]:
    """A transaction of somebody else's that has locked the table, as any statement of the application does."""
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(f"LOCK TABLE {TABLE} IN {mode} MODE")
        yield
        connection.rollback()


def waits_for_a_lock(database: Database, statement: str) -> int:
    return sessions(database, extra=f"AND wait_event_type = 'Lock' AND starts_with(query, '{statement}')")
