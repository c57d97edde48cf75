"""Tables that are not for scripts: the first block of every step refuses them, up and down, before any change."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations

from demo.openmemory import TABLE
from openmemory_migrations import ops
from openmemory_migrations.embedded import Server
from openmemory_migrations.marks import CUT_OVER
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.native import create_newer
from tests.support.openmemory import Database, random_rows
from tests.support.scripts import (
    DIM8,
    SINGLE,
    Case,
    assert_same,
    everything,
    offline,
    psql,
    psql_that_waits,
    script,
    stopped,
)
from tests.support.states import BACKFILL, EXPAND, HEAD, stamp

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

NAME = f'"public.{TABLE}"'
NONE = {"OM_INDEX": "none"}
# each step as the first of a script: where it begins, the command, and what is set
BEGINNINGS = [
    (None, ("upgrade", "head"), {}),
    (EXPAND, ("upgrade", f"{EXPAND}:head"), {}),
    (BACKFILL, ("upgrade", f"{BACKFILL}:head"), {}),
    (BACKFILL, ("upgrade", f"{BACKFILL}:head"), NONE),
    (None, ("upgrade", EXPAND), {}),
    (HEAD, ("downgrade", f"{HEAD}:base"), {}),
    (BACKFILL, ("downgrade", f"{BACKFILL}:{EXPAND}"), {}),
    (EXPAND, ("downgrade", f"{EXPAND}:base"), {}),
]


def bytes_(database: Database) -> None:
    Case(bad=False).prepare(database)


def native(database: Database) -> None:
    create_newer(database, random_rows(60, 8))


def altered(sql: str) -> Callable[[Database], None]:
    def prepare(database: Database) -> None:
        bytes_(database)
        database.run(sql)

    return prepare


def cut_over(mode: str) -> Callable[[Database], None]:
    def prepare(database: Database) -> None:
        bytes_(database)
        alembic(database, "upgrade", "head")
        alembic(database, "-n", "cutover", "upgrade", "head", env={"OM_CUTOVER": mode})

    return prepare


@dataclass(frozen=True)
class Other:
    """A table of another kind, and what is said of it."""

    prepare: Callable[[Database], None]
    said: str
    online: bool = True  # whether the online run can be seen to do it here
    cut_over: bool = False


PARTITIONED = f"""
ALTER TABLE {TABLE} RENAME TO t;
CREATE TABLE {TABLE} (LIKE t) PARTITION BY LIST (sector);
CREATE TABLE p PARTITION OF {TABLE} DEFAULT;
INSERT INTO {TABLE} SELECT * FROM t
"""
# there is no Citus here: the catalog by which its tables are known
DISTRIBUTED = f"""
SET allow_system_table_mods = on;
CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass);
INSERT INTO pg_catalog.pg_dist_partition VALUES ('{TABLE}')
"""
OTHERS = {
    "native": Other(native, f'column "v" of {NAME} is of type vector already'),
    "native, empty": Other(create_newer, f'column "v" of {NAME} is of type vector already'),
    "native, its dimensions": Other(
        altered(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} DROP v; ALTER TABLE {TABLE} ADD v vector(8)"),
        f'column "v" of {NAME} is of type vector already',
    ),
    "partitioned": Other(altered(PARTITIONED), f"{NAME} is a partitioned table"),
    "partition": Other(
        altered(
            f"CREATE TABLE t (LIKE {TABLE}) PARTITION BY LIST (sector); ALTER TABLE t ATTACH PARTITION {TABLE} DEFAULT"
        ),
        f"{NAME} is a partition",
        online=False,
    ),
    "parent": Other(
        altered(f"CREATE TABLE child () INHERITS ({TABLE}); INSERT INTO child SELECT * FROM {TABLE}"),
        f"{NAME} is a table that others inherit from",
        online=False,
    ),
    "child": Other(
        altered(f"CREATE TABLE parent (v bytea); ALTER TABLE {TABLE} INHERIT parent"),
        f"{NAME} inherits from another table",
    ),
    "view": Other(
        altered(f"ALTER TABLE {TABLE} RENAME TO t; CREATE VIEW {TABLE} AS SELECT * FROM t"),
        f"{NAME} is not an ordinary table",
        online=False,
    ),
    "distributed": Other(altered(DISTRIBUTED), f"{NAME} is distributed by Citus", online=False),
    "cut over, swap": Other(
        cut_over("swap"), f'{NAME} was cut over: "v" is the vector, the bytes are "v_bytea"', cut_over=True
    ),
    "cut over, drop": Other(
        cut_over("drop"), f'{NAME} was cut over: "v" was dropped, "v_vector" is what there is', cut_over=True
    ),
}


def begin_at(database: Database, revision: str | None) -> None:
    """As if that were stamped: what a script adds to the version table is seen by that."""
    database.run("DROP TABLE IF EXISTS openmemory_alembic_version")
    if revision:
        database.run("CREATE TABLE openmemory_alembic_version (version_num varchar(32) PRIMARY KEY)")
        database.run("INSERT INTO openmemory_alembic_version VALUES (%s)", revision)


@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
@pytest.mark.parametrize("kind", OTHERS)
def test_the_first_block_of_each_step_names_what_the_table_is_and_the_online_command(
    server: Server, databases: Databases, kind: str, single: dict[str, str]
) -> None:
    other = OTHERS[kind]
    with databases.copy(other.prepare) as database:
        for revision, command, env in BEGINNINGS:
            begin_at(database, revision)
            direction, span = command
            run = f"Run it online: alembic {direction} {span.rpartition(':')[2]}."
            hint = f"Scripts (--sql) are for ordinary tables of bytes. {run}"
            if other.cut_over:
                hint = (
                    run if direction == "upgrade" else "First undo the cutover: alembic -n cutover downgrade base, or"
                )

            stopped(server, database, single | env, f"ERROR:  {other.said}\nHINT:  {hint}", command=command)


@pytest.mark.parametrize("kind", [kind for kind, other in OTHERS.items() if other.online])
def test_the_command_that_the_hint_names_does_it(server: Server, databases: Databases, kind: str) -> None:
    with databases.copy(OTHERS[kind].prepare) as database:
        begin_at(database, None)
        refused = offline(server, database, "upgrade", "head", check=False).stderr
        (named,) = re.findall(r"Run it online: alembic (.*)\.$", refused, re.MULTILINE)

        alembic(database, *named.split(), env=DIM8)


@pytest.mark.parametrize(("revision", "command", "env"), BEGINNINGS)
def test_whoever_forgets_to_tell_psql_to_stop_at_errors_changes_nothing_either(
    server: Server, databases: Databases, revision: str | None, command: tuple[str, str], env: dict[str, str]
) -> None:
    with databases.copy(native) as database:
        begin_at(database, revision)
        before = everything(database)

        done = psql(server, database, script(*command, env=DIM8 | env), "-v", "ON_ERROR_STOP=0", check=False)

        assert OTHERS["native"].said in done.stderr
        assert_same(before, everything(database))


@pytest.mark.parametrize(("revision", "command", "env"), BEGINNINGS)
def test_a_table_that_is_cut_over_while_the_script_waits_for_it_is_refused(
    server: Server, databases: Databases, revision: str | None, command: tuple[str, str], env: dict[str, str]
) -> None:
    """What the first look has seen no longer holds once the lock is there, so it is asked after."""

    def migrated(database: Database) -> None:
        bytes_(database)
        alembic(database, "upgrade", "head")

    with databases.copy(migrated) as database:
        begin_at(database, revision)
        with closing(database.connect()) as switching, switching.cursor() as cursor:
            switching.autocommit = False
            cursor.execute(
                f"LOCK TABLE {TABLE}; ALTER TABLE {TABLE} RENAME v TO v_bytea;"
                f"ALTER TABLE {TABLE} RENAME v_vector TO v; COMMENT ON COLUMN {TABLE}.v IS '{CUT_OVER}'"
            )
            sql = script(*command, env=DIM8 | env | {"OM_LOCK_TIMEOUT_MS": "9000"})
            waits = "SELECT FROM pg_locks WHERE NOT granted"
            done = psql_that_waits(server, database, sql, lambda: database.rows(waits), switching.commit)

        assert done.returncode == 3
        assert f'{NAME} was cut over: "v" is the vector, the bytes are "v_bytea"' in done.stderr
        assert (stamp(database) or []) == [revision] * bool(revision)
        assert database.value(f"SELECT count(v) FROM {TABLE}") > 0


def test_steps_that_no_command_of_alembic_has_called_say_so_too() -> None:
    printed = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": printed, "literal_binds": True}
    )

    with Operations.context(context):
        ops.upgrade_expand(dimensions=8)

    assert "HINT = 'Scripts (--sql) are for ordinary tables of bytes. Run it online.'" in printed.getvalue()
