"""The cutover by an owner without any other right, with a writer who may not look where the extension is."""

from __future__ import annotations

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.commands import alembic
from tests.support.cutover import BAD, DIM, LOSS, ROWS, bytes_of, changed, cut_over, roles, text_of, undo, whole
from tests.support.openmemory import Database, Row, create_table, load, random_rows

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

GIVEN = f"""
ALTER TABLE {TABLE} OWNER TO {{owner}};
ALTER ROLE {{owner}} LOGIN;
ALTER ROLE {{writer}} LOGIN;
GRANT CREATE ON SCHEMA public TO {{owner}};
GRANT USAGE ON SCHEMA extensions TO {{owner}};
GRANT SELECT, INSERT, UPDATE, DELETE ON {TABLE} TO {{writer}};
ALTER DEFAULT PRIVILEGES FOR ROLE {{owner}} GRANT ALL ON TABLES TO {{writer}};
"""


def writes(writer: Database, row: Row, column: str, value: object) -> None:
    sql = SQL("UPDATE {} SET {} = %s WHERE id = %s AND sector = %s")
    writer.run(sql.format(Identifier(TABLE), Identifier(column)), value, row.id, row.sector)


def test_the_owner_may_and_a_writer_is_followed(database: Database, server: Server) -> None:
    database.run("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    create_table(database)
    load(database, [*ROWS, *BAD])
    with roles(database) as (writer, owner):
        database.run(SQL(GIVEN).format(writer=writer, owner=owner))
        as_writer, as_owner = (
            Database(database.name, server.url(database.name, user=role.string)) for role in (writer, owner)
        )
        alembic(as_owner, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)})
        before, v = whole(database), bytes_of(database)

        cut_over(as_owner, "swap", {"OM_ACCEPT_LOSS": str(LOSS)})
        assert database.value(f"SELECT count(*) FROM {TABLE}_v_kept") == LOSS
        assert as_writer.value(f"SELECT count(*) FROM {TABLE}_v_kept") == 0
        (new,) = random_rows(1, DIM, seed=41)
        writes(as_writer, ROWS[0], "v", text_of(new.v or b""))
        undo(as_owner)

        assert bytes_of(database) == v | {(ROWS[0].id, ROWS[0].sector): new.v}
        writes(as_writer, ROWS[0], "v", ROWS[0].v)
        assert not changed(before, whole(database))
