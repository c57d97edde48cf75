"""What the console script says of a table that was cut over."""

from __future__ import annotations

import json

import pytest

from demo.openmemory import TABLE
from tests.support.commands import alembic, om
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.states import INDEX, indexes

pytestmark = pytest.mark.slow
SAID = {
    "swap": f'"public.{TABLE}" was cut over: "v" is the vector, the bytes are "v_bytea"',
    "drop": f'"public.{TABLE}" was cut over: "v" was dropped, "v_vector" is what there is',
}
NAMES = {"swap": "openmemory_vectors_hnsw_idx", "drop": INDEX}


@pytest.mark.parametrize("mode", SAID)
def test_every_command_knows_of_it(database: Database, mode: str) -> None:
    create_table(database)
    load(database, random_rows(120, 8))
    alembic(database, "upgrade", "head")
    up = om(database, "cutover", "upgrade", "--json", "-x", f"cutover={mode}")
    assert json.loads(up.stdout) == {"revisions": ["om_20240109_cutover"], "at_head": True}, up.log
    column = "v" if mode == "swap" else "v_vector"
    database.run(
        f"INSERT INTO {TABLE} (id, sector, {column}, dim) VALUES (gen_random_uuid(), 'semantic', %s, 8)",
        "[1,2,3,4,5,6,7,8]",
    )

    found = json.loads(om(database, "status", "--json").stdout)
    assert found["fine"]
    assert found["cut_over"] == {
        "mode": mode,
        "undoing": False,
        "rows": 121,
        "vectors": 121,
        "vectors_without_bytes": 1 if mode == "swap" else 121,
        "kept": 0,
    }
    assert found["next"] == "nothing"
    lines = om(database, "status").stdout
    assert SAID[mode] in lines
    done = om(database, "backfill")
    assert done.returncode == 0, done.log
    assert f"{SAID[mode]}; nothing to do" in done.stderr
    for command, said in (("verify", "121; none compared: there are no bytes"), ("tune", "sample: 121 of 121 rows")):
        done = om(database, command)
        assert done.returncode == 0, done.log
        assert said in " ".join(done.stdout.split())
    checked = om(database, "check")
    assert checked.returncode == 0, checked.log
    assert SAID[mode] in checked.stdout
    index = json.loads(om(database, "index", "--rebuild", "--json", "-x", "index=hnsw").stdout)
    assert (index["index"], index["built"]) == (NAMES[mode], True)
    assert indexes(database)[NAMES[mode]][1]
    reported = om(database, "report", "--output", "/dev/null")
    assert reported.returncode == 0, reported.log

    refused = om(database, "downgrade", "base")
    assert refused.returncode == 1
    assert f"ERROR:  {SAID[mode]}\nHINT:  First undo the cutover: alembic -n cutover downgrade base" in refused.stderr
    assert om(database, "cutover", "downgrade").returncode == 0
    assert json.loads(om(database, "status", "--json").stdout)["cut_over"] is None
    assert json.loads(om(database, "cutover", "current", "--json").stdout) == {"revisions": [], "at_head": False}
