"""Whatever ends the cutover or its undoing, wherever: the same command again ends as if nothing had happened."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.cases import exhaustive
from tests.support.commands import alembic, om, result, start_alembic
from tests.support.cutover import BAD, DIM, DOWN, LOSS, MODES, STAMP, UP, VERSION_TABLE, changed, stamped, whole
from tests.support.databases import Databases
from tests.support.interruption import (
    FIRST,
    assert_survives_kills,
    holding,
    kill,
    killed,
    wait_until_gone,
    waits_for_a_lock,
)
from tests.support.openmemory import Database, checksum, create_database, create_table, load, random_rows
from tests.support.proxy import Verdict, proxy
from tests.support.scripts import offline
from tests.support.servers import OPTIONS, programs
from tests.support.sessions import eventually, terminate
from tests.support.states import EXPAND, State, column_type, snapshot, without_guards

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

ROWS = 2000
DATA = random_rows(ROWS, DIM)
SLOWLY = {"BACKFILL_BATCH": "25"}  # 80 batches and commits
POINTS = 6
NEWER, LEFT, KEPT = "openmemory_vectors_hnsw_idx", f"{TABLE}_vvector_left", f"{TABLE}_v_kept"
OLD = f"{TABLE}_vvector_idx_old"  # newer OpenMemory's, between the switch back and its end
ORIGINAL = {TABLE, f"{TABLE}_pkey", "openmemory_vectors_user_idx"}
VERSIONS = {VERSION_TABLE, f"{VERSION_TABLE}_pkc"}
EXCLUSIVE = "IN ACCESS EXCLUSIVE MODE"
Step = tuple[str, tuple[str, ...]]
STEPS: list[Step] = [(mode, command) for mode in MODES for command in (UP, DOWN)]
Ends = Mapping[Step, State]


def env(mode: str) -> dict[str, str]:
    return {"OM_CUTOVER": mode, "OM_ACCEPT_LOSS": str(LOSS), **SLOWLY}


def filled(database: Database) -> Database:
    create_table(database)
    load(database, [*DATA, *BAD])
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)})
    return database


def relations(database: Database) -> set[str]:
    mine = (
        "relnamespace = 'public'::regnamespace AND relname !~ '^openmemory_alembic_version' AND relkind IN ('r', 'i')"
    )
    return {name for (name,) in database.rows(f"SELECT relname FROM pg_class WHERE {mine}")}


def start_of(database: Database, mode: str, command: tuple[str, ...]) -> None:
    filled(database)
    if command == DOWN:
        alembic(database, *UP, env=env(mode))


class Prepared:
    """What each step leaves undisturbed, and which statements it sends."""

    def __init__(self, databases: Databases) -> None:
        self.ends: dict[Step, State] = {}
        self.statements: dict[Step, list[str]] = {}
        for step in STEPS:
            mode, command = step
            with databases.copy(start_of, *step) as database, proxy(databases.server) as between:
                if command == UP:
                    self.v = checksum(database)
                alembic(between.to(database), *command, env=env(mode))
                self.statements[step], self.ends[step] = between.statements, whole(database)


@pytest.fixture(scope="module")
def prepared(databases: Databases) -> Prepared:
    return Prepared(databases)


@pytest.fixture
def table(databases: Databases, step: Step) -> Iterator[Database]:
    with databases.copy(start_of, *step) as database:
        yield database


def assert_ends_well(table: Database, step: Step, prepared: Prepared) -> None:
    mode, command = step
    alembic(table, *command, env=env(mode))
    assert not changed(prepared.ends[step], whole(table))
    assert stamped(table) == ([STAMP] if command == UP else [])
    if command == UP:
        alembic(table, *DOWN, env=SLOWLY)
        assert not changed(prepared.ends[mode, DOWN], whole(table))
    assert checksum(table) == prepared.v


steps = pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[0]} {step[1][2]}")


@pytest.mark.parametrize(
    "step",
    [exhaustive(step, id=f"{step[0]} {step[1][2]}") if step in STEPS[1:3] else step for step in STEPS],
    ids=lambda step: f"{step[0]} {step[1][2]}",
)
def test_the_cutover_killed_wherever_it_writes(databases: Databases, step: Step) -> None:
    mode, command = step
    few = {**env(mode), "BACKFILL_BATCH": "1000"}
    assert_survives_kills(databases, start_of, step, command, whole, few)


@pytest.mark.exhaustive
@pytest.mark.parametrize("point", range(POINTS))
@steps
def test_the_cutover_killed_at_a_random_point(
    server: embedded.Server, table: Database, prepared: Prepared, step: Step, point: int
) -> None:
    mode, command = step
    chosen = random.Random(f"{step} {point}")
    statements = prepared.statements[step]
    first = next(i for i, text in enumerate(statements, 1) if FIRST in text)
    share = (point + chosen.random()) / POINTS
    number = first + int(share * (len(statements) - 2 - first))
    verdict: Verdict = chosen.choice(["before", "after"])
    print(f"killed {verdict} statement {number} of {len(statements)}: {statements[number - 1][:200]}")

    killed(server, table, command, lambda seen, _: verdict if seen == number else None, env(mode))

    assert_ends_well(table, step, prepared)


@pytest.mark.parametrize("prepares", ["kept rows", "a constraint"])
@pytest.mark.parametrize("by", ["the chain", "its script", "the undo"])
@pytest.mark.parametrize("step", STEPS[:1])
def test_a_cutover_that_is_never_resumed_is_given_up(
    server: embedded.Server, table: Database, step: Step, prepares: str, by: str
) -> None:
    if prepares == "a constraint":
        table.run(f"DELETE FROM {TABLE} WHERE v_vector IS NULL")
        table.run(f"ALTER TABLE {TABLE} ALTER v SET NOT NULL")
    there, before, v = relations(table), whole(table), checksum(table)
    killed(server, table, UP, lambda _, text: "before" if EXCLUSIVE in text else None, env("swap"))
    kept = {KEPT} if prepares == "kept rows" else set()
    assert relations(table) - there - VERSIONS == {LEFT, NEWER} | kept
    assert (LEFT in repr(snapshot(table)["constraints"])) == (prepares == "a constraint")

    if by == "its script":
        down = ("downgrade", "head:base")
        if kept:
            refused = offline(server, table, *down, env={"OM_VEC_DIM": str(DIM)}, check=False)
            assert f'rows of "public.{TABLE}" are in table "{KEPT}"' in refused.stderr
            alembic(table, *DOWN)
            down = ("downgrade", f"{EXPAND}:base")  # the index is dropped, and that is stamped
        offline(server, table, *down, env={"OM_VEC_DIM": str(DIM)})
    else:
        alembic(table, *(DOWN if by == "the undo" else ("downgrade", "base")))

    assert checksum(table) == v
    if by == "the undo":
        assert not changed(before, whole(table))
        return
    assert relations(table) == ORIGINAL | VERSIONS
    left = snapshot(table)
    assert not left["triggers"] + left["functions"]
    assert LEFT not in repr(left["constraints"])


@pytest.mark.parametrize("prepares", ["kept rows", "a constraint"])
@pytest.mark.parametrize("step", STEPS[:1])
def test_what_a_kill_has_left_is_named_where_the_table_got_another_name_since(
    server: embedded.Server, table: Database, step: Step, prepares: str
) -> None:
    if prepares == "a constraint":
        table.run(f"DELETE FROM {TABLE} WHERE v_vector IS NULL; ALTER TABLE {TABLE} ALTER v SET NOT NULL")
    rows = table.value(f"SELECT count(*) FROM {TABLE}")
    killed(server, table, UP, lambda _, text: "before" if EXCLUSIVE in text else None, env("swap"))
    table.run(f"ALTER TABLE {TABLE} RENAME TO renamed")
    renamed = {"OM_VECTOR_TABLE": "renamed", **env("swap")}
    named = KEPT if prepares == "kept rows" else f"constraint {LEFT}, which refuses"

    status = om(table, "status", env=renamed)
    assert (status.returncode, named in status.stdout) == (1, True)
    for command in (UP, ("downgrade", "base"), DOWN):
        said = alembic(table, *command, env=renamed, check=False).log
        assert 'FAILED: an interrupted cutover of "public.renamed", which had another name then, has left' in said
        assert named in said

    (lines,) = set(re.findall("HINT:  (ALTER .*); then the same", said))
    table.run(lines)
    alembic(table, *DOWN, env=renamed)
    assert table.value("SELECT count(*) FROM renamed") == rows
    assert "_left" not in repr(snapshot(table)["constraints"])
    assert not relations(table) & {KEPT, "renamed_v_kept"}


@pytest.mark.parametrize("step", STEPS[:1])
def test_newer_openmemorys_index_goes_though_the_undoing_was_killed_after_its_switch(
    table: Database, step: Step
) -> None:
    alembic(table, "-n", "cutover", "stamp", "head")
    table.run(f"CREATE INDEX {OLD} ON {TABLE} USING hnsw (v_vector vector_cosine_ops)")

    alembic(table, *DOWN)

    assert OLD not in relations(table)
    assert stamped(table) == []


def rebuilt(table: Database, column: str = "v_bytea") -> set[tuple[str, ...]]:
    """Which versions of which rows have their bytes again."""
    if column_type(table, column) is None:
        return set()
    return set(table.rows(f"SELECT id, sector, xmin::text FROM {TABLE} WHERE {column} IS NOT NULL"))


@pytest.mark.parametrize("step", [("drop", DOWN)])
def test_what_was_rebuilt_before_a_kill_is_not_rebuilt_again(table: Database, prepared: Prepared, step: Step) -> None:
    process = start_alembic(table, *DOWN, env=SLOWLY)
    eventually(lambda: len(rebuilt(table)) > 0.2 * ROWS)
    kill(process)
    wait_until_gone(table)
    before = rebuilt(table)
    assert 0.2 * ROWS < len(before) < 0.9 * ROWS

    log = alembic(table, *DOWN).log

    left = ROWS - len(before)
    assert f'rebuilding "v" of {TABLE}: {left:,} of {left:,} rows (100 %)' in log
    assert before <= rebuilt(table, "v"), "a row was rebuilt twice"
    assert not changed(prepared.ends[step], whole(table))


@pytest.mark.parametrize("how", ["immediate", "fast"])
def test_the_server_stops_and_comes_back(how: str) -> None:
    """In the middle of the way back, then, of the way there, when all is ready for the switch."""
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        table = filled(create_database(server, "stopped"))
        before = whole(table)
        process = start_alembic(table, *UP, env=env("drop"))
        with suppress(psycopg2.Error), holding(table, "ACCESS SHARE"):
            eventually(lambda: waits_for_a_lock(table, "LOCK TABLE"))
            server.stop(how)
            server.start()
        assert result(process).returncode == 0
        assert stamped(table) == [STAMP]
        process = start_alembic(table, *DOWN, env=SLOWLY)
        eventually(lambda: len(rebuilt(table)) > 0.2 * ROWS)
        server.stop(how)
        server.start()
        ended = result(process)
        assert ended.returncode == 0, ended.log
        assert not changed(before, whole(table))


@pytest.mark.parametrize("step", STEPS[2:3])
def test_a_session_that_is_terminated_is_opened_again(table: Database, prepared: Prepared, step: Step) -> None:
    with holding(table, "ACCESS SHARE"):
        process = start_alembic(table, *UP, env=env("drop"))
        eventually(lambda: waits_for_a_lock(table, "LOCK TABLE"))
        assert terminate(table)
        eventually(lambda: waits_for_a_lock(table, "LOCK TABLE"))
    ended = result(process)
    assert ended.returncode == 0, ended.log
    assert not changed(prepared.ends[step], whole(table))


@pytest.mark.parametrize(("mode", "how"), [("swap", signal.SIGTERM), ("drop", signal.SIGINT)])
@pytest.mark.parametrize("step", STEPS[:1])
def test_a_run_that_is_stopped_takes_away_what_it_has_prepared(table: Database, mode: str, how: signal.Signals) -> None:
    before = whole(table)
    with holding(table, "ACCESS SHARE"):
        process = start_alembic(table, *UP, env=env(mode))
        eventually(lambda: waits_for_a_lock(table, "LOCK TABLE"))
        process.send_signal(how)
        # not at the price of waiting for who reads the table
        eventually(lambda: KEPT not in relations(table))
    ended = result(process)
    assert f"stopped by {how.name}" in ended.log
    assert ended.returncode != 0
    if mode == "swap":
        table.run(f"DROP INDEX {NEWER}")  # which takes long to build and waits for the next run
    # but for what could not go while somebody read the table
    assert not changed(before, without_guards(whole(table)))
    assert stamped(table) is None
