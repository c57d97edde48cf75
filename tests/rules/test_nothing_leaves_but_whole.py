"""Rows that no vector can hold leave at a cutover whole and come back whole; at every moment they are in one table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from tests.support.commands import alembic, om, result, start_alembic
from tests.support.cutover import (
    DOWN,
    STAMP,
    UNDO,
    UP,
    VERSION_TABLE,
    both_modes,
    changed,
    cut_over,
    quoted,
    refuses,
    roles,
    stamped,
    undo,
    whole,
)
from tests.support.databases import Databases
from tests.support.openmemory import Database, Row, create_table, load, pack, random_rows
from tests.support.proxy import proxy
from tests.support.states import column_type, without_guards

DIM = 4
ROWS = random_rows(20, DIM)
BAD = [
    row._replace(v=v) for row, v in zip(random_rows(3, DIM, 7), [b"\1", pack([float("nan")] * DIM), b""], strict=True)
]
ACCEPTED = {"OM_ACCEPT_LOSS": str(len(BAD)), "OM_INDEX": "none"}
KEPT = f"{TABLE}_v_kept"
BESIDE = f"""
ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_pkey, ALTER v SET NOT NULL, ADD number int GENERATED ALWAYS AS IDENTITY,
  ADD doubled int GENERATED ALWAYS AS (2 * dim) STORED, ADD note varchar(9) COLLATE "C" NOT NULL DEFAULT 'é',
  ADD gone int;
ALTER TABLE {TABLE} DROP gone
"""


def at_head(database: Database, *statements: str) -> None:
    create_table(database)
    load(database, [*ROWS, *BAD])
    for statement in statements:
        database.run(statement)
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM), "OM_INDEX": "none"})


@pytest.fixture
def table(databases: Databases) -> Iterator[Database]:
    with databases.copy(at_head) as database:
        yield database


def where(row: Row) -> str:
    return f"id = '{row.id}'"


def count(database: Database, table: str = TABLE) -> int:
    found: int = database.value(f"SELECT count(*) FROM {table}")
    return found


@both_modes
def test_rows_of_a_table_without_a_key_leave_whole_and_come_back_whole(databases: Databases, mode: str) -> None:
    with databases.copy(at_head, BESIDE) as table:
        before = whole(table)
        of_bad = f"SELECT id, sector, user_id, v, dim, number, note FROM {TABLE} WHERE user_id IS NOT NULL"
        rows = {row[0]: repr(row) for row in table.rows(of_bad.replace("v,", "encode(v, 'hex'),"))}

        log = cut_over(table, mode, ACCEPTED).log

        assert f'3 rows of "public.{TABLE}" that no vector can hold are in "{KEPT}" now' in log
        assert count(table) == len(ROWS)
        left = table.rows(f"SELECT id, sector, user_id, encode(v, 'hex'), dim, number, note FROM {KEPT}")
        assert {row[0]: repr(row) for row in left} == {row.id: rows[row.id] for row in BAD}
        log = undo(table).log
        assert f'3 rows that no vector can hold are back in "public.{TABLE}"' in log
        assert not changed(before, whole(table))


def test_a_row_whose_key_another_has_taken_stays_and_is_named(table: Database) -> None:
    """Nor does a row that has left follow an update by its key."""
    first, second, _ = BAD
    before = whole(table)
    cut_over(table, "drop", ACCEPTED)
    table.run(f"UPDATE {TABLE} SET sector = 'another' WHERE {where(first)}")
    table.run(f"INSERT INTO {TABLE} (id, sector, user_id, dim) VALUES (%s, %s, 'other', 1)", second.id, second.sector)

    done = alembic(table, *DOWN, check=False)

    assert done.returncode != 0
    assert f'1 rows of "public.{TABLE}" are still in table "{KEPT}"' in done.log
    named = f"1 (such as (id={second.id}, sector={second.sector})) refused with SQLSTATE 23505"
    assert f'{named}, constraint "{TABLE}_pkey"' in done.log
    assert f"then again: {UNDO}." in done.log
    assert table.rows(f"SELECT user_id, v FROM {TABLE} WHERE {where(second)}") == [("other", None)]
    assert table.value(f"SELECT count(*) FROM {TABLE} WHERE v IN ('\\x', '\\x01')") == 2
    assert table.rows(f"SELECT id, v = %s FROM {KEPT}", second.v) == [(second.id, True)]
    assert column_type(table, "v") == "bytea"
    assert stamped(table) == [STAMP]

    table.run(f"DELETE FROM {TABLE} WHERE {where(second)}")
    undo(table)

    assert not changed(before, whole(table))
    assert stamped(table) == []


def test_what_would_follow_rows_that_leave_is_named(table: Database) -> None:
    table.run(
        f"""
        CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TABLE other (id uuid, sector text, CONSTRAINT fk FOREIGN KEY (id, sector) REFERENCES {TABLE}
                            ON DELETE CASCADE);
        CREATE TRIGGER audit AFTER DELETE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION nothing();
        CREATE TRIGGER unasked AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION nothing();
        CREATE RULE never AS ON DELETE TO {TABLE} DO INSTEAD NOTHING
        """
    )
    said = f"foreign key fk of public.other; rule never on public.{TABLE}; trigger audit on public.{TABLE}\n"
    refuses(table, f'3 rows have to leave "public.{TABLE}"', said, mode="drop", env=ACCEPTED)
    # where no row has to leave they are in nobody's way
    table.run(f"DROP RULE never ON {TABLE}; DELETE FROM {TABLE} WHERE v_vector IS NULL")
    cut_over(table, "drop", {"OM_INDEX": "none"})


def test_a_row_that_others_refer_to_ends_the_cutover_as_if_it_had_not_begun(table: Database) -> None:
    table.run(f"CREATE TABLE other (id uuid, sector text, CONSTRAINT fk FOREIGN KEY (id, sector) REFERENCES {TABLE})")
    table.run("INSERT INTO other VALUES (%s, %s)", BAD[2].id, BAD[2].sector)
    named = f"1 (such as (id={BAD[2].id}, sector={BAD[2].sector})) refused with SQLSTATE 23503"
    refuses(table, f'1 rows of "public.{TABLE}" have no vector', f'{named}, constraint "fk"', env=ACCEPTED)


def test_rows_that_a_changed_table_would_not_hold_as_they_are_stay(table: Database) -> None:
    before = whole(table)
    cut_over(table, "swap", ACCEPTED)
    table.run(f"ALTER TABLE {TABLE} ALTER dim TYPE smallint")

    done = alembic(table, *DOWN, check=False)

    assert done.returncode != 0
    assert f'column "dim" of type integer, which rows of "public"."{KEPT}" have, is of type smallint in' in done.log
    assert count(table, KEPT) == len(BAD)
    table.run(f"ALTER TABLE {TABLE} ALTER dim TYPE integer")
    undo(table)
    assert not changed(before, whole(table))


def test_rows_that_are_not_found_are_missed_before_any_change(table: Database) -> None:
    before = whole(table)
    cut_over(table, "drop", ACCEPTED)
    comment = table.value("SELECT obj_description(%s::regclass)", KEPT)
    table.run(f"COMMENT ON TABLE {KEPT} IS NULL")

    done = alembic(table, *DOWN, check=False, env={"OM_ACCEPT_LOSS": "2"})

    assert done.returncode != 0
    assert f'3 rows have left "public.{TABLE}" at its cutover, and 0 of them are in table "{KEPT}"' in done.log
    assert f'COMMENT ON TABLE "public"."{KEPT}" IS \'{comment}\';' in done.log
    assert "OM_ACCEPT_LOSS=3." in done.log
    assert column_type(table, "v") is None
    status = om(table, "status")
    assert (status.returncode, "3 rows have left" in status.stdout) == (1, True)
    table.run(f"COMMENT ON TABLE {KEPT} IS '{comment}'")
    assert f'3 rows that no vector can hold, in "{KEPT}"' in om(table, "status").stdout
    undo(table)
    assert not changed(before, whole(table))


def test_rows_are_missed_that_others_have_deleted_and_nobody_has_accepted(table: Database) -> None:
    cut_over(table, "swap", ACCEPTED)
    table.run(f"DELETE FROM {KEPT} WHERE {where(BAD[0])}")
    assert "3 rows have left" in alembic(table, *DOWN, check=False).log
    # there are no bytes to compare, and those rows can't be right
    verified = om(table, "verify", "--queries", "0", env={"OM_INDEX": "none"})
    assert verified.returncode == 1
    assert "3 rows have left" in verified.stdout
    undo(table, {"OM_ACCEPT_LOSS": "1"})
    assert count(table) == len(ROWS) + 2


def test_a_table_in_the_place_of_another_does_not_get_its_rows(table: Database) -> None:
    cut_over(table, "drop", ACCEPTED)
    table.run(f"ALTER TABLE {TABLE} RENAME TO before; DELETE FROM {VERSION_TABLE}")
    table.run("DELETE FROM openmemory_alembic_version")
    at_head(table)
    refuses(table, f'the name "{KEPT}" is taken', "keeps the rows of another table", mode="drop", env=ACCEPTED)

    alembic(table, *DOWN)

    assert (count(table), count(table, KEPT)) == (len(ROWS) + len(BAD), len(BAD))
    table.run(f"DROP TABLE {TABLE}; ALTER TABLE {KEPT} RENAME TO before_v_kept")
    table.run(f"INSERT INTO {VERSION_TABLE} VALUES (%s)", STAMP)
    undo(table, {"OM_VECTOR_TABLE": "before"})
    assert count(table, "before") == len(ROWS) + len(BAD)


def test_a_kept_table_from_a_dump_is_found(table: Database) -> None:
    """The oid that it names is no table's in the database where it was restored."""
    cut_over(table, "drop", ACCEPTED)
    table.run(f"COMMENT ON TABLE {KEPT} IS 'openmemory_migrations: rows that no vector can hold, of it, oid 1'")
    undo(table)
    assert count(table) == len(ROWS) + len(BAD)


def test_rows_leave_and_come_back_where_all_tables_are_published(table: Database) -> None:
    table.run("CREATE PUBLICATION everything FOR ALL TABLES")
    before = whole(table)
    cut_over(table, "drop", ACCEPTED)
    undo(table)
    assert not changed(before, whole(table))


def test_the_owner_of_the_table_undoes_what_another_role_has_cut_over(databases: Databases, table: Database) -> None:
    with roles(table) as (owner, other):
        table.run(
            SQL("ALTER TABLE {} OWNER TO {}; GRANT ALL ON SCHEMA public TO {}; ALTER ROLE {} LOGIN").format(
                Identifier(TABLE), owner, owner, owner
            )
        )
        before = whole(table)["rows"]
        cut_over(table, "drop", ACCEPTED)
        kept_owner = "SELECT relowner::regrole::text FROM pg_class WHERE oid = %s::regclass"
        assert table.value(kept_owner, KEPT) == quoted(owner)
        table.run(
            SQL("ALTER TABLE {} OWNER TO {}; GRANT ALL ON {} TO {}").format(
                Identifier(KEPT), other, Identifier(VERSION_TABLE), owner
            )
        )
        table.run(SQL("GRANT SELECT ON openmemory_alembic_version TO {}").format(owner))
        by_owner = Database(table.name, databases.server.url(table.name, user=owner.string))
        line = f'ALTER TABLE "public"."{KEPT}" OWNER TO {quoted(owner)};'
        assert line in alembic(by_owner, *DOWN, check=False).log
        assert line in om(by_owner, "status").stdout
        table.run(SQL("ALTER TABLE {} OWNER TO {}").format(Identifier(KEPT), owner))
        undo(by_owner)
        assert whole(table)["rows"] == before


@contextmanager
def before_a_batch(databases: Databases, table: Database, change: str) -> Iterator[Database]:
    left = [change]

    def watch(statement: str) -> None:
        if statement.endswith("IN ROW EXCLUSIVE MODE") and left:
            table.run(left.pop())

    with proxy(databases.server, watch) as between:
        yield between.to(table)
    assert not left


def test_a_key_that_comes_before_a_batch_ends_the_cutover(databases: Databases, table: Database) -> None:
    key = f"FOREIGN KEY (id, sector) REFERENCES {TABLE} ON DELETE CASCADE"
    other = f"CREATE TABLE other AS SELECT id, sector FROM {TABLE}; ALTER TABLE other ADD CONSTRAINT fk {key}"
    with before_a_batch(databases, table, other) as between:
        done = alembic(between, *UP, env={"OM_CUTOVER": "drop", **ACCEPTED}, check=False)
    assert done.returncode != 0
    assert "something would follow or keep them: foreign key fk of public.other" in done.log
    assert count(table, "other") == count(table) == len(ROWS) + len(BAD)


@pytest.mark.parametrize("forward", [True, False])
def test_nothing_moves_once_another_table_has_the_name(databases: Databases, table: Database, forward: bool) -> None:
    if not forward:
        cut_over(table, "drop", ACCEPTED)
    swap = (
        f"ALTER TABLE {TABLE} RENAME TO blue; CREATE TABLE {TABLE} (LIKE blue INCLUDING ALL);"
        f"INSERT INTO {TABLE} SELECT * FROM blue"
    )
    with before_a_batch(databases, table, swap) as between:
        env = {"OM_CUTOVER": "drop", **ACCEPTED} if forward else {}
        done = alembic(between, *(UP if forward else DOWN), env=env, check=False)
    assert done.returncode != 0
    assert f'another table has got the name "public"."{TABLE}"' in done.log
    assert count(table) == count(table, "blue") == len(ROWS) + (len(BAD) if forward else 0)
    if not forward:
        table.run(f"DROP TABLE {TABLE}; ALTER TABLE blue RENAME TO {TABLE}")
        undo(table)
        assert count(table) == len(ROWS) + len(BAD)


@pytest.mark.slow
def test_a_row_that_stays_locked_is_waited_for_and_its_holder_named(table: Database) -> None:
    before = whole(table)
    with closing(table.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(f"SELECT FROM {TABLE} WHERE {where(BAD[1])} FOR UPDATE")
        env = {"OM_CUTOVER": "drop", "OM_LOCK_TIMEOUT_MS": "50", **ACCEPTED}
        ended = result(start_alembic(table, *UP, env=env, patch="tries.TRIES = 4"))
    assert ended.returncode != 0
    assert "1 rows are left, and rows stay locked by somebody" in ended.log
    assert "Locks on the table are held by process" in ended.log
    assert not changed(before, without_guards(whole(table)))


@pytest.mark.slow
def test_rows_that_a_trigger_swallows_or_changes_stay(table: Database) -> None:
    before = whole(table)
    cut_over(table, "drop", ACCEPTED)
    table.run(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        f"CREATE TRIGGER swallow BEFORE INSERT ON {TABLE} FOR EACH ROW WHEN (NEW.{where(BAD[2])})"
        " EXECUTE FUNCTION swallow();"
        "CREATE FUNCTION alter() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.user_id := NULL; RETURN NEW; END';"
        f"CREATE TRIGGER alter BEFORE INSERT ON {TABLE} FOR EACH ROW WHEN (NEW.{where(BAD[1])})"
        " EXECUTE FUNCTION alter()"
    )
    done = alembic(table, *DOWN, check=False)
    assert "2 (such as " in done.log
    assert "refused with no error, by a trigger or a rule that keeps rows out or changes them" in done.log
    assert f'A trigger: ALTER TABLE "public"."{TABLE}" DISABLE TRIGGER … for the time of the undo.' in done.log
    assert (count(table), count(table, KEPT)) == (len(ROWS) + 1, 2)
    table.run("DROP FUNCTION swallow() CASCADE; DROP FUNCTION alter() CASCADE")
    undo(table)
    assert not changed(before, whole(table))


def test_a_row_comes_back_whose_bytes_somebody_has_taken_away(table: Database) -> None:
    before = whole(table)
    cut_over(table, "drop", ACCEPTED)
    table.run(f"UPDATE {KEPT} SET v = NULL WHERE {where(BAD[0])}")
    undo(table)
    assert (count(table), table.value(f"SELECT to_regclass('{KEPT}')")) == (len(ROWS) + len(BAD), None)
    table.run(f"UPDATE {TABLE} SET v = %s WHERE {where(BAD[0])}", BAD[0].v)
    assert not changed(before, whole(table))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_rows_stay_that_a_trigger_would_delete_or_clear_once_they_are_back(table: Database, when: str) -> None:
    """One that only touches them is the host's own business."""
    before = whole(table)
    cut_over(table, "drop", ACCEPTED)
    for number, (name, statement) in enumerate(
        {
            "touches": f"UPDATE {TABLE} SET user_id = 'touched'",
            "clears": f"UPDATE {TABLE} SET v = NULL",
            "deletes": f"DELETE FROM {TABLE}",
        }.items()
    ):
        table.run(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {statement} WHERE id = NEW.id;"
            f" RETURN NULL; END $$; CREATE CONSTRAINT TRIGGER {name} AFTER INSERT ON {TABLE} {when} FOR EACH ROW"
            f" WHEN (NEW.{where(BAD[number])}) EXECUTE FUNCTION {name}()"
        )
    done = alembic(table, *DOWN, check=False)
    assert "refused with no error, by a trigger or a rule that keeps rows out or changes them" in done.log
    assert (count(table), count(table, KEPT)) == (len(ROWS) + len(BAD) - 2, 2)
    table.run("DROP FUNCTION clears() CASCADE; DROP FUNCTION deletes() CASCADE; DROP FUNCTION touches() CASCADE")
    undo(table)
    table.run(f"UPDATE {TABLE} SET user_id = %s WHERE {where(BAD[0])}", BAD[0].user_id)
    assert not changed(before, whole(table))


def test_nothing_under_the_lock_of_the_switch_grows_with_what_was_accepted(table: Database) -> None:
    table.run(f"INSERT INTO {TABLE} SELECT gen_random_uuid(), 's', 'u', '\\x02', 1 FROM generate_series(1, 2500)")
    cut_over(table, "drop", {**ACCEPTED, "OM_ACCEPT_LOSS": str(len(BAD) + 2500)})
    of_switch = "(SELECT xmin FROM pg_description WHERE objoid = %s::regclass AND objsubid > 0)"
    found = table.rows(
        f"SELECT count(*), count(DISTINCT xmin::text) > 2, count(*) FILTER (WHERE xmin = {of_switch}) FROM {KEPT}",
        TABLE,
    )
    assert found == [(len(BAD) + 2500, True, 0)]


def test_what_is_lost_as_accepted_is_said(database: Database) -> None:
    at_head(database)
    cut_over(database, "drop", env=ACCEPTED)
    database.run(f"DROP TABLE {KEPT}")
    log = alembic(database, *DOWN, env=ACCEPTED).log
    assert f"WARNING:  {len(BAD)} rows that left" in log
    assert f"are lost, as OM_ACCEPT_LOSS={len(BAD)} accepts" in log

    database.run(f"UPDATE {TABLE} SET v = NULL, v_vector = '[1,2,3,4]' WHERE id = '{ROWS[3].id}'")
    log = alembic(database, "downgrade", "base", env={"OM_ACCEPT_LOSS": "5"}).log
    assert "WARNING:  1 values of" in log


@pytest.mark.parametrize("mode", ["swap", "drop"])
def test_what_would_keep_a_cutover_from_being_undone_is_told_by_status(database: Database, mode: str) -> None:
    at_head(database)
    cut_over(database, mode, env=ACCEPTED)
    assert om(database, "status", env=ACCEPTED).returncode == 0
    name = "v_vector" if mode == "swap" else "v"
    database.run(f"ALTER TABLE {TABLE} ADD {name} text")

    for command in ("status", "verify"):
        told = om(database, command, env=ACCEPTED)
        assert told.returncode == 1
        assert f'has got a column "{name}" since the cutover' in told.stdout


def test_verify_is_not_right_while_rows_are_in_the_kept_table(database: Database) -> None:
    """A row that has come meanwhile has the key of one that left: that stays where it is when the cutover is undone."""
    at_head(database)
    cut_over(database, "drop", env=ACCEPTED)
    row = BAD[0]
    database.run(f"INSERT INTO {TABLE} (id, sector, dim, v_vector) VALUES (%s, %s, 4, '[1,2,3,4]')", row.id, row.sector)
    assert alembic(database, *DOWN, env=ACCEPTED, check=False).returncode > 0

    told = om(database, "verify")

    assert told.returncode == 1
    assert f'1 rows of "public.{TABLE}" are in table "{KEPT}"' in told.stdout
