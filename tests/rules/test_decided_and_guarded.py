"""R2: a write that a change would lose, because it was decided before that write, is refused until the change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import alembic, om, start_alembic
from tests.support.databases import Databases
from tests.support.interruption import killed
from tests.support.native import create_newer
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.proxy import Verdict, proxy
from tests.support.scripts import psql, script, start_psql
from tests.support.sessions import eventually
from tests.support.states import EXPAND, column_type, guards, refused

DIM = 8
ROWS = random_rows(60, DIM)
ALONE = "IN ACCESS EXCLUSIVE MODE"
GUARD = f"{TABLE}_vvector_guard"
CUTOVER = ("-n", "cutover")
OWN = "'[1,2,3,4,5,6,7,8]'"
BYTES = "decode('0000803f0000004000004040000080400000a0400000c0400000e04000000041', 'hex')"
NEW = f"INSERT INTO {TABLE} (id, sector, user_id, dim, {{}}) VALUES (gen_random_uuid(), 'own', 'u', {DIM}, {{}})"


def at_head(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})


def expanded(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", EXPAND)


def cut_over(database: Database, mode: str) -> None:
    at_head(database)
    alembic(database, *CUTOVER, "upgrade", "head", env={"OM_CUTOVER": mode, "OM_INDEX": "none"})


def adopting(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector({DIM})")
    alembic(database, "upgrade", EXPAND)


def typing(database: Database) -> None:
    create_newer(database, ROWS)
    alembic(database, "upgrade", EXPAND)


class Step(NamedTuple):
    """`losing` are writes whose values would be gone after the step; `fine` are those of an application."""

    make: Callable[..., None]
    args: tuple[str, ...]
    command: tuple[str, ...]
    losing: tuple[str, ...]
    fine: tuple[str, ...]
    env: dict[str, str]


BY_THE_TRIGGER = (
    f"UPDATE {TABLE} SET v = {BYTES} WHERE sector = 'semantic'",
    f"UPDATE {TABLE} SET user_id = 'other'",
    f"UPDATE {TABLE} SET sector = 'moved' WHERE sector = 'episodic'",
    NEW.format("v", BYTES),
    f"DELETE FROM {TABLE} WHERE sector = 'emotional'",
)
UNFIT = NEW.format("v", "'\\x0102'")
STEPS = {
    "downgrade": Step(
        at_head,
        (),
        ("downgrade", "base"),
        (
            NEW.format("v_vector", OWN),
            NEW.format("v, v_vector", f"decode(repeat('0000c07f', {DIM}), 'hex'), {OWN}"),
            f"UPDATE {TABLE} SET v = NULL, v_vector = {OWN} WHERE sector = 'semantic'",
        ),
        (*BY_THE_TRIGGER, UNFIT, f"UPDATE {TABLE} SET v_vector = {OWN} WHERE sector = 'semantic'"),
        {},
    ),
    "adopted": Step(
        adopting,
        (),
        ("upgrade", "head"),
        (NEW.format("v_vector_adopted", OWN),),
        # also with a default of that column's
        (
            *BY_THE_TRIGGER,
            UNFIT,
            NEW.format("v_vector", OWN),
            f"UPDATE {TABLE} SET v_vector_adopted = {OWN} WHERE sector = 'semantic'",
            NEW.format("v, v_vector_adopted", f"{BYTES}, {OWN}"),
        ),
        {"OM_INDEX": "none"},
    ),
    "drop": Step(
        at_head,
        (),
        (*CUTOVER, "upgrade", "head"),
        (
            f"UPDATE {TABLE} SET v_vector = {OWN} WHERE sector = 'semantic'",
            f"UPDATE {TABLE} SET v_vector = NULL WHERE sector = 'semantic'",
            NEW.format("v, v_vector", f"decode(repeat('0000803f', {DIM}), 'hex'), {OWN}"),
        ),
        (*BY_THE_TRIGGER, UNFIT, NEW.format("v_vector", OWN), NEW.format("v, v_vector", f"{BYTES}, {OWN}")),
        {"OM_CUTOVER": "drop", "OM_INDEX": "none", "OM_ACCEPT_LOSS": "1"},
    ),
    "swap": Step(
        at_head,
        (),
        (*CUTOVER, "upgrade", "head"),
        (f"UPDATE {TABLE} SET v_vector = {OWN} WHERE sector = 'semantic'",),
        BY_THE_TRIGGER,
        {"OM_CUTOVER": "swap", "OM_INDEX": "none"},
    ),
    "undo of a drop": Step(
        cut_over,
        ("drop",),
        (*CUTOVER, "downgrade", "base"),
        (f"UPDATE {TABLE} SET v_bytea = {BYTES}", f"UPDATE {TABLE} SET v_bytea = NULL"),
        (
            f"UPDATE {TABLE} SET v_vector = {OWN} WHERE sector = 'semantic'",
            f"UPDATE {TABLE} SET user_id = 'other'",
            NEW.format("v_vector", OWN),
            NEW.format("v_bytea", BYTES),
        ),
        {},
    ),
    "undo of a swap": Step(
        cut_over,
        ("swap",),
        (*CUTOVER, "downgrade", "base"),
        (f"UPDATE {TABLE} SET v_bytea = {BYTES}",),
        (f"UPDATE {TABLE} SET v = {OWN} WHERE sector = 'semantic'", NEW.format("v", OWN)),
        {"OM_INDEX": "none"},
    ),
    "dimensions": Step(
        typing,
        (),
        ("upgrade", "head"),
        (f"UPDATE {TABLE} SET v_typed = {OWN}",),
        (f"UPDATE {TABLE} SET v = {OWN} WHERE sector = 'semantic'", NEW.format("v", OWN)),
        {"OM_INDEX": "none"},
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_would_lose_is_refused_and_all_else_goes_on(databases: Databases, name: str) -> None:
    step = STEPS[name]
    refused: list[str] = []
    went_on: list[str] = []

    def watch(statement: str) -> Verdict:
        if statement.endswith(ALONE) and guards(database) and not refused:
            for losing in step.losing:
                with pytest.raises(psycopg2.errors.ObjectInUse, match="can't have a value of its own now"):
                    database.run(losing)
                refused.append(losing)
            for fine in step.fine:
                database.run(fine)
                went_on.append(fine)
        return None

    with databases.copy(step.make, *step.args) as database, proxy(databases.server, watch) as between:
        alembic(between.to(database), *step.command, env=step.env)

        assert (len(refused), len(went_on)) == (len(step.losing), len(step.fine))
        assert guards(database) == []
        if name == "downgrade":
            assert column_type(database, "v_vector") is None
            return
        assert om(database, "status", env={"OM_INDEX": "none"}).returncode == 0
        assert om(database, "verify", env={"OM_INDEX": "none"}).returncode == 0


@pytest.mark.parametrize("name", ["downgrade", "drop"])
def test_a_transaction_that_has_written_before_is_waited_for(databases: Databases, name: str) -> None:
    """Nothing could refuse what it has written, so it has to be seen."""
    step = STEPS[name]
    losing = step.losing[0]
    with databases.copy(step.make, *step.args) as database, closing(database.connect()) as other:
        other.autocommit = False
        other.cursor().execute(losing)
        process = start_alembic(database, *step.command, env=step.env)
        eventually(lambda: database.value("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0, 30)
        other.commit()
        _, log = process.communicate(60)

        assert process.returncode != 0, log
        assert "would be lost" in log or "the vector is another than the bytes" in log
        assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector::text = {OWN}") > 0
        assert guards(database) == []


def test_what_a_killed_downgrade_has_left_is_named_and_goes(server: embedded.Server, database: Database) -> None:
    at_head(database)
    down = ("downgrade", EXPAND), ("downgrade", "base")
    alembic(database, *down[0])
    killed(server, database, down[1], lambda _, text: "before" if text.endswith(ALONE) else None)

    # nobody is at work: it refuses nothing, and under another name it is found all the same
    database.run(NEW.format("v_vector", OWN))
    database.run(f"DELETE FROM {TABLE} WHERE sector = 'own'")
    database.run(f'ALTER TRIGGER {GUARD} ON {TABLE} RENAME TO "Other"')
    said = om(database, "status").stdout
    assert 'trigger "Other", without any effect' in said

    alembic(database, *down[1])
    assert guards(database) == []


@pytest.mark.parametrize("name", ["downgrade", "adopted"])
def test_a_script_takes_away_what_a_killed_run_has_left(databases: Databases, name: str) -> None:
    """A trigger that is left on a column that is gone would fail every write."""
    step = STEPS[name]
    with databases.copy(step.make, *step.args) as database:
        killed(databases.server, database, step.command, lambda _, text: left(database, text), step.env)
        assert guards(database)
        column = "v_vector" if name == "downgrade" else "v_vector_adopted"
        with pytest.raises(psycopg2.errors.DependentObjectsStillExist, match=column):
            database.run(f"ALTER TABLE {TABLE} DROP COLUMN {column}")

        where = f"{EXPAND}:base" if name == "downgrade" else f"{EXPAND}:head"
        psql(databases.server, database, script(step.command[0], where, env={"OM_VEC_DIM": str(DIM)}))

        assert column_type(database, column) is None
        assert guards(database) == []
        for fine in BY_THE_TRIGGER:
            database.run(fine)


def left(database: Database, statement: str) -> Verdict:
    return "before" if statement.endswith(ALONE) and guards(database) else None


@pytest.mark.parametrize("by_script", [False, True])
@pytest.mark.parametrize(
    "bits",
    [
        "0000c07f",
        *(pytest.param(bits, marks=pytest.mark.slow) for bits in ("0100807f", "0000807f", "000080ff", "ffffffff")),
    ],
)
def test_a_vector_beside_bytes_that_no_vector_can_hold_has_no_source(
    databases: Databases, bits: str, by_script: bool
) -> None:
    """The writer's own vector stays, beside whatever bytes it has written with it."""
    with databases.copy(expanded) as database:
        fine = "0000803fffff7f7fffff7fff0000008001000080ffff7fc1"
        database.run(NEW.format("v, v_vector", f"decode('{fine}ffffff7e{bits}', 'hex'), {OWN}"))
        env = {"OM_VEC_DIM": str(DIM)}
        if by_script:
            down = script("downgrade", f"{EXPAND}:base", env=env)
            done = psql(databases.server, database, down, check=False)
            assert "1 values have no source and would be lost" in done.stderr
        else:
            refused(database, '1 values of "v_vector" have no source', command=("downgrade", "base"), env=env)
        assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector::text = {OWN}") == 1

        database.run(f"UPDATE {TABLE} SET v = decode('{fine}ffffff7effff7f7f', 'hex') WHERE sector = 'own'")
        if by_script:
            psql(databases.server, database, down)
        else:
            alembic(database, "downgrade", "base")
        assert column_type(database, "v_vector") is None


def test_a_script_waits_for_who_has_written_before_it_counts(databases: Databases) -> None:
    """Also what takes long to count, and was counted before the lock."""
    lost = NEW.format("v, v_vector", f"decode(repeat('0000c07f', {DIM}), 'hex'), {OWN}")
    down = script("downgrade", f"{EXPAND}:base", env={"OM_VEC_DIM": str(DIM)})
    with databases.copy(expanded) as database, closing(database.connect()) as other:
        other.autocommit = False
        other.cursor().execute(lost)
        process = start_psql(databases.server, database, down)
        eventually(lambda: database.value("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0, 30)
        other.commit()
        _, log = process.communicate(timeout=60)

        assert "1 values have no source and would be lost" in log
        assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector::text = {OWN}") == 1


@pytest.fixture
def role_without_rights(database: Database) -> Iterator[str]:
    role = f"writer_{database.name}"
    database.run(f"CREATE ROLE {role}")
    yield role
    database.run(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_writer_needs_no_right_of_the_guards(
    server: embedded.Server, database: Database, role_without_rights: str
) -> None:
    database.run("CREATE SCHEMA hidden; CREATE EXTENSION vector SCHEMA hidden")
    at_head(database)
    database.run(f"GRANT SELECT, INSERT, UPDATE ON {TABLE} TO {role_without_rights}")
    written: list[int] = []

    def watch(statement: str) -> Verdict:
        if statement.endswith(ALONE) and guards(database) and not written:
            with closing(database.connect()) as connection, connection.cursor() as cursor:
                cursor.execute(f"SET ROLE {role_without_rights}; UPDATE {TABLE} SET v = {BYTES}")
                written.append(cursor.rowcount)
        return None

    with proxy(server, watch) as between:
        alembic(between.to(database), *STEPS["drop"].command, env=STEPS["drop"].env)
    assert written == [len(ROWS)]
