"""R7: a loop that changes nothing any more ends with an error that names rows and what keeps them."""

from __future__ import annotations

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.scripts import DIM8, SINGLE, offline
from tests.support.states import EXPAND, stamp

TRIGGER = f"""
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN %s; END';
CREATE TRIGGER hold BEFORE UPDATE ON {TABLE} FOR EACH ROW WHEN (OLD.user_id = 'user7') EXECUTE FUNCTION hold()
"""
KEPT = {
    "no row": (TRIGGER % "RETURN NULL", "trigger hold"),
    "no vector": (TRIGGER % "NEW.v_vector := NULL; RETURN NEW", "trigger hold"),
    "rule": (
        f"CREATE RULE hold AS ON UPDATE TO {TABLE} WHERE old.user_id = 'user7' DO INSTEAD NOTHING",
        "rule hold",
    ),
}


@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
@pytest.mark.parametrize("kind", KEPT)
def test_a_script_ends_where_updates_change_nothing(
    server: Server, database: Database, kind: str, single: dict[str, str]
) -> None:
    sql, named = KEPT[kind]
    create_table(database)
    load(database, random_rows(60, 8))
    offline(server, database, "upgrade", EXPAND)
    database.run(sql)

    result = offline(server, database, "upgrade", f"{EXPAND}:head", env=DIM8 | single, check=False)

    assert result.returncode == 3
    assert f"ERROR:  backfill {TABLE}: 3 rows can't be updated or read\nDETAIL:  ctid=(" in result.stderr
    assert f"not changed by an UPDATE, perhaps because of {named}." in result.stderr
    assert stamp(database) == [EXPAND]
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == (0 if single else 57)
