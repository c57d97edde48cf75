"""What `verify` can't look at: a clear message and the right exit code."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from demo.openmemory import TABLE
from tests.support.commands import om
from tests.support.openmemory import Database
from tests.support.verification import table

pytestmark = pytest.mark.slow

__all__ = ["table"]  # a fixture


@pytest.mark.parametrize(
    ("setup", "env", "code", "said"),
    [
        ("SELECT", {"OM_DATABASE_URL": ""}, 2, "no database is configured"),
        ("SELECT", {"OM_DATABASE_URL": "{stranger}"}, 2, 'role "nobody_here" does not exist'),
        ("SELECT", {"OM_DATABASE_URL": "{elsewhere}"}, 2, 'database "nowhere" does not exist'),
        ("SELECT", {"OM_DATABASE_URL": "postgresql://127.0.0.1:1/postgres"}, 3, "Connection refused"),
        ("SELECT", {"OM_INDEX": "btree"}, 2, "OM_INDEX must be ivfflat, hnsw or none"),
        ("SELECT", {"OM_VECTOR_TABLE": "elsewhere"}, 1, 'table "public.elsewhere" does not exist'),
        (f"ALTER TABLE {TABLE} DROP COLUMN v CASCADE", {}, 1, 'has no column "v"'),
        (f"ALTER TABLE {TABLE} DROP COLUMN v_vector", {}, 1, 'no column "v_vector" of this package yet'),
        ("CREATE ROLE {role} LOGIN", {"OM_DATABASE_URL": "{poor}"}, 1, f"permission denied for table {TABLE}"),
    ],
)
def test_what_can_not_be_looked_at(table: Database, setup: str, env: Mapping[str, str], code: int, said: str) -> None:
    role = f"poor_{table.name}"
    urls = {
        "stranger": table.url.replace("postgres@", "nobody_here@"),
        "poor": table.url.replace("postgres@", f"{role}@"),
        "elsewhere": table.url.replace(f"/{table.name}?", "/nowhere?"),
    }
    table.run(setup.format(role=role))

    done = om(table, "verify", env={name: value.format(**urls) for name, value in env.items()})

    table.run(f"DROP ROLE IF EXISTS {role}")
    assert (done.returncode, done.stdout) == (code, ""), done.log
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("json", [True, False])
def test_v_that_is_a_vector_already_is_nothing_to_compare(database: Database, json: bool) -> None:
    database.run(f"CREATE EXTENSION vector; CREATE TABLE {TABLE} (id uuid, sector text, v vector(3), dim integer)")

    done = om(database, "verify", *(["--json"] if json else []))

    assert done.returncode == 0
    assert ('"comparison": null' if json else "none compared: there are no bytes") in done.stdout
    assert ('"fine": true' in done.stdout) == json
