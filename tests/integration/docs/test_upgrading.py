"""docs/upgrading-openmemory.md, command by command, with what OpenMemory itself does in between."""

from __future__ import annotations

import re
import shlex

import pytest

from demo.openmemory import TABLE
from tests.support.commands import ROOT, om
from tests.support.native import NEWER, SEARCH, START, UPSERT
from tests.support.openmemory import Database, checksum, create_table, load, real_rows
from tests.support.states import column_type, indexes
from tests.support.writers import UPSERT as OLD_UPSERT

DOC = (ROOT / "docs" / "upgrading-openmemory.md").read_text()
# OpenMemory's own commands, as the database sees them
THEIRS = {
    "npm run migrate": f"ALTER TABLE {TABLE} ADD COLUMN IF NOT EXISTS project_id text",
    "npm start": f"CREATE EXTENSION IF NOT EXISTS vector; {NEWER}; {START}",
}
KEY = "00000000-0000-4000-8000-00000000beef"


def block(name: str) -> list[str]:
    after = DOC.split(f"<!-- {name} -->\n```")[1].split("```")[0]
    return after.splitlines()[1:]


def follow(database: Database, name: str) -> str:
    """Types what the document says; OpenMemory's own commands are what they do to the database. Returns the log."""
    log = ""
    for line in block(f"commands: {name}"):
        assert line.startswith("$ "), line
        words = shlex.split(line[2:], comments=True)
        env = dict(word.split("=") for word in words if re.fullmatch(r"OM_\w+=\w+", word))
        command = words[len(env) :]
        if command[0] == "openmemory-migrations":
            done = om(database, *command[1:], env=env)
            assert done.returncode == 0, f"{line}\n{done.log}"
            log += done.log
        else:
            database.run(THEIRS[" ".join(command)])
    return log


@pytest.mark.slow
def test_from_a_table_of_1_1_to_1_3_and_back(database: Database) -> None:
    rows = real_rows(256)
    create_table(database)
    load(database, rows)
    before = checksum(database)

    follow(database, "before")
    assert checksum(database) == before
    database.run(OLD_UPSERT, KEY, "semantic", "user", rows[0].v, 256)
    with_one_more = checksum(database)
    log = follow(database, "switch")

    assert "building index" not in log.split("is verified to the bit")[1]
    assert column_type(database, "v") == "vector(256)"
    assert list(indexes(database)) == ["openmemory_vectors_hnsw_idx"]
    ours = str(database.value(f"SELECT v FROM {TABLE} WHERE id = %s", KEY))
    database.run(UPSERT, KEY, "procedural", "user", "project", ours, 256)
    assert database.rows(SEARCH, ours, "procedural", ours)[0] == (KEY, 1)
    for v in (rows[1].v, rows[1].v.hex() if rows[1].v else ""):
        with pytest.raises(Exception, match="vector"):
            database.run(OLD_UPSERT, KEY, "semantic", "user", v, 256)

    follow(database, "back")
    assert bytes(database.value(f"SELECT v FROM {TABLE} WHERE sector = 'procedural' AND id = %s", KEY)) == rows[0].v
    database.run(f"DELETE FROM {TABLE} WHERE sector = 'procedural' AND id = %s", KEY)
    assert checksum(database) == with_one_more
    database.run(OLD_UPSERT, KEY, "semantic", "user", rows[2].v, 256)


@pytest.mark.slow
def test_without_the_archive_all_bytes_are_made_from_the_vectors(database: Database) -> None:
    create_table(database)
    load(database, real_rows(256))
    before = checksum(database)
    follow(database, "before")
    follow(database, "switch")

    database.run("\n".join(block("sql: archive")))
    database.run(f"UPDATE {TABLE} SET v = v")
    follow(database, "back")

    assert checksum(database) == before


@pytest.mark.slow
def test_a_fresh_installation_of_a_newer_version(database: Database) -> None:
    database.run(f"CREATE EXTENSION vector; {NEWER}")
    with pytest.raises(Exception, match="column does not have dimensions"):
        database.run(THEIRS["npm start"])

    follow(database, "fresh")

    assert column_type(database, "v") == "vector(256)"
    assert list(indexes(database)) == ["openmemory_vectors_hnsw_idx"]
    follow(database, "bare again")
    assert column_type(database, "v") == "vector"
    assert indexes(database) == {}
