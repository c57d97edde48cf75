"""R2: a change that was decided by what the rows hold is made only where nobody has touched the table in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import psycopg2
import pytest
from sqlalchemy.engine import CursorResult

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.errors import Changed
from openmemory_migrations.sql import Fragment
from tests.support.commands import alembic
from tests.support.native import create_newer
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, random_rows
from tests.support.package import package
from tests.support.proxy import Verdict, proxy
from tests.support.scripts import psql, script
from tests.support.states import EXPAND, column_type

DIM = 8
ROWS = random_rows(60, DIM)
CUTOVER = ("-n", "cutover")
ALONE = "IN ACCESS EXCLUSIVE MODE"
REWRITE = f"ALTER TABLE {TABLE} ALTER user_id TYPE text USING user_id || ''"
PAST = f"ALTER TABLE {TABLE} DISABLE TRIGGER ALL; {{}}; ALTER TABLE {TABLE} ENABLE TRIGGER ALL"
VALUE = f"INSERT INTO {TABLE} (id, sector, dim, v_vector) VALUES (gen_random_uuid(), 'own', {DIM}, '[1,2,3,4,5,6,7,8]')"


@contextmanager
def changed_before_the_lock(server: embedded.Server, database: Database, *changes: str) -> Iterator[Database]:
    """Between what a run has read and its lock, somebody makes one change each time that it comes so far."""
    left = list(changes)
    refused: list[psycopg2.Error] = []

    def watch(statement: str) -> Verdict:
        if statement.endswith(ALONE) and left:
            try:
                database.run(left.pop(0))
            except psycopg2.Error as error:
                refused.append(error)
        return None

    with proxy(server, watch) as between:
        yield between.to(database)
    assert not left
    if refused:
        raise refused[0]


def test_a_downgrade_counts_again_what_came_with_a_rewrite(server: embedded.Server, database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", EXPAND)

    with changed_before_the_lock(server, database, f"{PAST.format(VALUE)}; {REWRITE}") as between:
        done = alembic(between, "downgrade", "base", check=False)

    assert done.returncode != 0
    assert "looking again" in done.log
    assert "1 values of" in done.log
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector IS NOT NULL AND v IS NULL") == 1


def test_values_that_came_with_a_rewrite_are_carried_over(server: embedded.Server, database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector({DIM})")
    alembic(database, "upgrade", EXPAND)
    adopted = VALUE.replace("v_vector", "v_vector_adopted")

    with changed_before_the_lock(server, database, f"{PAST.format(adopted)}; {REWRITE}") as between:
        alembic(between, "upgrade", "head")

    assert column_type(database, "v_vector_adopted") is None
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector IS NOT NULL AND v IS NULL") == 1


def test_vectors_that_were_written_past_a_disabled_trigger_are_found(
    server: embedded.Server, database: Database
) -> None:
    """The trigger is back when the column is to take the place of `v`: that it is there proves nothing."""
    create_newer(database, ROWS)
    trigger = f"ALTER TABLE {TABLE} {{}} TRIGGER ALL;"
    past = f"{trigger.format('DISABLE')} UPDATE {TABLE} SET v = '[8,7,6,5,4,3,2,1]'; {trigger.format('ENABLE')}"

    # the first two give it its column
    with changed_before_the_lock(server, database, "SELECT", past) as between:
        done = alembic(between, "upgrade", "head", check=False)

    assert done.returncode != 0
    assert f'{len(ROWS)} rows of "public.openmemory_vectors" have another' in done.log
    assert database.value(f"SELECT DISTINCT v::text FROM {TABLE}") == "[8,7,6,5,4,3,2,1]"


@pytest.mark.parametrize("step", ["cutover", "undo"])
def test_what_was_written_past_a_disabled_trigger_is_not_dropped_by_a_switch(
    server: embedded.Server, database: Database, step: str
) -> None:
    """To drop the bytes by what was compared before, or to call bytes right that are another vector's."""
    create_table(database)
    load(database, ROWS)
    drop, up, down = {"OM_CUTOVER": "drop"}, (*CUTOVER, "upgrade", "head"), (*CUTOVER, "downgrade", "base")
    alembic(database, "upgrade", "head")
    column, other = ("v", "'\\x01020304'"), ("v_vector", "'[8,7,6,5,4,3,2,1]'")
    if step == "undo":
        alembic(database, *up, env=drop)
    name, value = column if step == "cutover" else other
    trigger = f"ALTER TABLE {TABLE} {{}} TRIGGER ALL;"
    past = f"{trigger.format('DISABLE')} UPDATE {TABLE} SET {name} = {value}; {trigger.format('ENABLE')}"

    with changed_before_the_lock(server, database, past) as between:
        done = alembic(between, *(up if step == "cutover" else down), env=drop, check=False)

    assert done.returncode != 0
    assert "looking again" in done.log
    said = (
        f"{len(ROWS)} rows of"
        if step == "cutover"
        else f'in {len(ROWS)} rows of "public.{TABLE}" "v_bytea" is not what'
    )
    assert said in done.log
    assert database.rows(f"SELECT DISTINCT {name} = {value} FROM {TABLE}") == [(True,)]


def test_more_rows_than_a_switch_moves_under_its_lock_leave_before_it(
    server: embedded.Server, database: Database
) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "head")
    some = f"INSERT INTO {TABLE} SELECT gen_random_uuid(), 's', 'u', '\\x01', 1 FROM generate_series(1, 150)"

    with changed_before_the_lock(server, database, some) as between:
        env = {"OM_CUTOVER": "drop", "OM_ACCEPT_LOSS": "150"}
        done = alembic(between, *CUTOVER, "upgrade", "head", env=env)

    assert "more than 100 rows of" in done.log
    assert "looking again" in done.log
    assert database.value(f"SELECT count(*) FROM {TABLE}_v_kept") == 150


def test_a_partition_that_was_away_is_looked_at_again(server: embedded.Server, database: Database) -> None:
    part = "semantic"
    database.run(
        f"CREATE EXTENSION vector; CREATE TABLE {TABLE} (id uuid, sector text, user_id text, project_id text, v vector,"
        f" dim integer NOT NULL, PRIMARY KEY (id, sector)) PARTITION BY LIST (sector);"
        f"CREATE TABLE {part} PARTITION OF {TABLE} FOR VALUES IN ('semantic');"
        f"CREATE TABLE others PARTITION OF {TABLE} DEFAULT"
    )
    create_newer(database, ROWS, sql="")
    away = (
        f"ALTER TABLE {TABLE} DETACH PARTITION {part}; UPDATE {part} SET v = '[8,7,6,5,4,3,2,1]';"
        f"ALTER TABLE {TABLE} ATTACH PARTITION {part} FOR VALUES IN ('semantic')"
    )

    with changed_before_the_lock(server, database, "SELECT", away) as between:
        done = alembic(between, "upgrade", "head", check=False)

    # its values were written while it had no trigger
    assert done.returncode != 0, done.log
    assert "have another" in done.log
    assert set(database.rows(f"SELECT v::text FROM {part}")) == {("[8,7,6,5,4,3,2,1]",)}


def test_a_partition_that_is_attached_while_the_lock_is_waited_for_is_locked_too(database: Database) -> None:
    database.run(
        f"CREATE TABLE {TABLE} (id integer, v bytea) PARTITION BY LIST (id);"
        f"CREATE TABLE one PARTITION OF {TABLE} FOR VALUES IN (1); CREATE TABLE two (id integer, v bytea)"
    )
    with closing(database.connect()) as other:
        other.autocommit = False
        cursor = other.cursor()
        statements: list[str] = []

        class Attaching(PackageDatabase):
            def run(
                self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: Fragment
            ) -> CursorResult[Any]:
                statements.append(template)
                found = super().run(template, parameters, **names)
                if template.startswith("LOCK TABLE") and len(statements) < 10:
                    cursor.execute(f"ALTER TABLE {TABLE} ATTACH PARTITION two FOR VALUES IN (2)")
                    other.commit()
                return found

        with package(database, Attaching) as db:
            db.take_over()
            statements.clear()
            with db.transaction(snapshot=True) as seen:
                locked = db.value(
                    "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()"
                    " AND relation IN ('public.one'::regclass, 'public.two'::regclass)"
                )
    assert len(seen) == 3
    assert locked == 2


def test_a_table_in_the_place_of_another_is_not_taken_for_it(database: Database) -> None:
    create_table(database)
    with package(database, PackageDatabase) as db:
        db.take_over()
        with db.transaction(snapshot=True) as seen:
            pass
        database.run(f"ALTER TABLE {TABLE} RENAME TO before; CREATE TABLE {TABLE} (LIKE before INCLUDING ALL)")
        with pytest.raises(Changed, match="another table"), db.transaction(snapshot=True):
            pass
        with pytest.raises(Changed), db.transaction():
            db.require_seen(seen)


def test_what_is_as_it_was_is_not_looked_at_again(database: Database) -> None:
    """Neither writes nor a vacuum or statistics make a look stale."""
    create_table(database)
    load(database, ROWS)
    v = checksum(database)
    alembic(database, "upgrade", "head")
    with package(database, PackageDatabase) as db:
        db.take_over()
        with db.transaction(snapshot=True) as seen:
            pass
        database.run(f"UPDATE {TABLE} SET user_id = 'other'")
        for statement in ("VACUUM", "ANALYZE", "CREATE INDEX ON"):
            database.run(f"{statement} {TABLE}" + (" (user_id)" if "INDEX" in statement else ""))
        with db.transaction():
            db.require_seen(seen)
    assert checksum(database) == v
    assert mismatches(database) == []


ADOPTED = f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector({DIM})"
NORMALIZE = f"""
CREATE FUNCTION one() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN NEW.v_vector := '[1,0,0,0,0,0,0,0]'; RETURN NEW; END $$;
CREATE TRIGGER zz_one BEFORE UPDATE ON {TABLE} FOR EACH ROW WHEN (NEW.v IS NULL) EXECUTE FUNCTION one();
"""


@pytest.mark.parametrize(
    ("bytes_", "trigger"), [("NULL", NORMALIZE), ("'\\x01'", ""), ("decode(repeat('0000c07f', 8), 'hex')", "")]
)
def test_an_adopted_value_that_is_nowhere_else_keeps_its_column(
    server: embedded.Server, database: Database, bytes_: str, trigger: str
) -> None:
    """It was changed on its way, or the bytes beside it are none that a vector can hold."""
    create_table(database)
    load(database, ROWS)
    database.run(ADOPTED)
    database.run(VALUE.replace("v_vector", "v, v_vector").replace("'[1", f"{bytes_}, '[1"))
    alembic(database, "upgrade", EXPAND)
    database.run(trigger or "SELECT")

    done = alembic(database, "upgrade", "head", check=False)

    assert done.returncode != 0
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector_adopted::text = '[1,2,3,4,5,6,7,8]'") == 1
    if not trigger:
        assert "1 values of" in done.log
        again = psql(server, database, script("upgrade", f"{EXPAND}:head", env={"OM_VEC_DIM": str(DIM)}), check=False)
        assert '1 values of "v_vector_adopted" would be lost' in again.stderr
        alembic(database, "upgrade", "head", env={"OM_ACCEPT_LOSS": "1"})
        assert column_type(database, "v_vector_adopted") is None


def test_what_a_subscription_applies_is_followed(database: Database) -> None:
    """Its sessions have session_replication_role at replica, where a trigger fires only if it is to fire always."""
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "head")
    database.run(f"SET session_replication_role = replica; UPDATE {TABLE} SET v = (SELECT v FROM {TABLE} LIMIT 1)")
    assert mismatches(database) == []


def test_a_script_counts_by_the_dimensions_that_are_there(server: embedded.Server, database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    env = {"OM_SYNC_TRIGGER": "off", "OM_VEC_DIM": str(DIM)}
    alembic(database, "upgrade", "head", env=env)
    database.run(f"UPDATE {TABLE} SET v = v || v")
    down = script("downgrade", "head:base", env={"OM_VEC_DIM": str(2 * DIM)})

    done = psql(server, database, down, check=False)

    assert f"{len(ROWS)} values have no source and would be lost" in done.stderr
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == len(ROWS)
