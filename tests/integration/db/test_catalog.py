"""What the catalogs say about indexes, in the terms in which a plan asks for one."""

from __future__ import annotations

import pytest

from openmemory_migrations.db import catalog
from openmemory_migrations.db.catalog import Index
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.index.choice import METHODS
from openmemory_migrations.target import Target
from tests.support.databases import Databases
from tests.support.openmemory import Database
from tests.support.package import package

COLUMN = 'V "x"'
QUOTED = '"V ""x"""'


def there(database: Database, *definitions: str) -> list[Index]:
    """Each index as the catalogs have it, in the order of the definitions."""
    names = [f"i{number}" for number in range(len(definitions))]
    database.run('CREATE SCHEMA "Ext x"; CREATE EXTENSION vector SCHEMA "Ext x"')
    database.run(f'CREATE TABLE "T" (id integer, other "Ext x".vector(3), {QUOTED} "Ext x".vector(3))')
    for name, definition in zip(names, definitions, strict=True):
        database.run(f'SET search_path = public, "Ext x"; CREATE INDEX {name} ON "T" USING {definition}')
    with package(database, PackageDatabase) as db, db.transaction():
        oid = db.value("SELECT CAST(CAST('public.\"T\"' AS regclass) AS oid)")
        rows = catalog.indexes_on(db, oid)
        found = {index.name: index for index in rows}
        assert len(found) == len(rows)
        own = catalog.own_indexes(db, Target("public", "T", vector=COLUMN), oid, *names)
    vectors = {name for name, index in found.items() if index.method in METHODS and index.column == COLUMN}
    assert own == {name: found[name] for name in vectors}
    return [found[name] for name in names]


@pytest.mark.parametrize("visible", [True, False], ids=["on the search_path", "not on it"])
def test_an_index_is_known_by_its_column_or_the_cast_of_it(databases: Databases, visible: bool) -> None:
    with databases.empty() as database:
        if visible:
            database.run(f'ALTER DATABASE {database.name} SET search_path = public, "Ext x"')
        found = there(
            database,
            f"ivfflat ({QUOTED} vector_l2_ops)",
            f"hnsw (({QUOTED}::halfvec(3)) halfvec_l2_ops)",
            f"hnsw ((subvector({QUOTED}, 1, 2)::halfvec(2)) halfvec_l2_ops)",
            f"hnsw (({QUOTED}::text::halfvec(3)) halfvec_l2_ops)",
            "hnsw ((other::halfvec(3)) halfvec_l2_ops)",
            f"hnsw ((({QUOTED} + other)::halfvec(3)) halfvec_l2_ops)",
            f"btree ({QUOTED})",
            f"btree (id, ({QUOTED}::halfvec(3)))",
            f"btree ({QUOTED}, ({QUOTED}::halfvec(3)))",
            f"btree (({QUOTED}::halfvec(3)), (other::halfvec(3)))",
        )

    assert [(index.column, index.half) for index in found] == [
        (COLUMN, None),
        (COLUMN, 3),
        (None, None),
        (None, None),
        ("other", 3),
        (None, None),
        (COLUMN, None),
        ("id", None),
        (COLUMN, None),
        (None, None),
    ]
    assert [index.key for index in found[:2]] == [COLUMN, f"{COLUMN}::halfvec(3)"]
    assert "subvector(" in found[2].key


@pytest.mark.parametrize(
    ("definition", "options"),
    [
        ("ivfflat (other vector_l2_ops)", {"lists=100"}),
        ("ivfflat (other vector_l2_ops) WITH (lists = 7)", {"lists=7"}),
        ("hnsw (other vector_l2_ops)", {"m=16", "ef_construction=64"}),
        ("hnsw (other vector_l2_ops) WITH (m = 24)", {"m=24", "ef_construction=64"}),
        ("btree (id)", set()),
        ("btree (id) WITH (fillfactor = 70)", {"fillfactor=70"}),
    ],
)
def test_options_that_an_index_leaves_out_are_pgvectors_defaults(
    databases: Databases, definition: str, options: set[str]
) -> None:
    with databases.empty() as database:
        (found,) = there(database, definition)

    assert found.options == options
