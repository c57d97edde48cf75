"""Trees that can't be migrated, each refused by the name of the partition and before any change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.commands import alembic
from tests.support.openmemory import Database
from tests.support.partitions import ELSEWHERE, assert_migrated, tree
from tests.support.states import column_type, refused, stamp

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

__all__ = ["tree"]  # a fixture

NAME = f'"public.{TABLE}"'


@pytest.fixture
def owner(server: Server, tree: Database) -> Iterator[Database]:
    """The database as a plain role sees it that owns the whole tree."""
    name = f"owner of {tree.name}"
    role = Identifier(name)
    tree.run(SQL("CREATE ROLE {} LOGIN").format(role))
    tree.run("CREATE EXTENSION vector")
    for part in (row[0] for row in tree.rows("SELECT relid::text FROM pg_partition_tree(%s)", TABLE)):
        tree.run(SQL("ALTER TABLE {} OWNER TO {}").format(SQL(part), role))
    tree.run(SQL("GRANT CREATE ON SCHEMA public TO {0}").format(role))
    tree.run(SQL("GRANT CREATE, USAGE ON SCHEMA {1} TO {0}").format(role, SQL(ELSEWHERE)))
    yield Database(tree.name, server.url(tree.name, user=name))
    tree.run(SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))


def test_a_foreign_table_as_a_partition_is_named(tree: Database) -> None:
    tree.run(
        "CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER nowhere FOREIGN DATA WRAPPER nowhere;"
        f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_pkey;"
        f"CREATE FOREIGN TABLE far PARTITION OF {TABLE} FOR VALUES IN ('far') SERVER nowhere"
    )

    # it has no rows to compare, not even to read
    result = alembic(tree, "upgrade", "head", check=False)

    assert result.returncode != 0
    assert f'FAILED: partition "public.far" of {NAME} is a foreign table' in result.log
    assert "HINT:  Only tables of this server" in result.log
    assert stamp(tree) is None
    assert column_type(tree) is None
    assert tree.rows("SELECT FROM pg_extension WHERE extname = 'vector'") == []


def test_a_view_on_the_adopted_column_of_a_leaf_is_named(tree: Database) -> None:
    tree.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector")
    tree.run(f"CREATE VIEW shown AS SELECT id, v_vector FROM {ELSEWHERE}.deepest")

    refused(tree, "views show it: public.shown", "HINT:  Drop them")

    assert stamp(tree) is None


@pytest.mark.parametrize("part", ["procedural", "procedural_low"])
def test_a_partition_is_not_a_target(tree: Database, part: str) -> None:
    refused(tree, f'"public.{part}" is a partition', "HINT:  Set OM_VECTOR_TABLE", env={"OM_VECTOR_TABLE": part})


def test_a_plain_role_that_owns_the_tree_can_do_it_all(tree: Database, owner: Database) -> None:
    alembic(owner, "upgrade", "head")
    assert_migrated(tree)
    alembic(owner, "downgrade", "base")


@pytest.mark.parametrize("part", [f"{ELSEWHERE}.rest", f"{ELSEWHERE}.deepest"])
def test_a_partition_of_another_owner_is_named(tree: Database, owner: Database, part: str) -> None:
    tree.run(f"ALTER TABLE {part} OWNER TO postgres")

    said = part.replace('""', "\0").replace('"', "").replace("\0", '"')
    said = said if "." in said else f"public.{said}"
    refused(tree, f'does not own partition "{said}" of {NAME}', '"postgres"', "HINT:  ALTER TABLE", by=owner)

    assert stamp(tree) is None


@pytest.mark.parametrize("part", ["procedural", "procedural_low"])
def test_a_partition_that_hides_rows_is_named(tree: Database, owner: Database, part: str) -> None:
    tree.run(f"ALTER TABLE {part} ENABLE ROW LEVEL SECURITY; ALTER TABLE {part} FORCE ROW LEVEL SECURITY")

    refused(tree, f'row-level security of "public.{part}" would hide rows', "HINT:  ", by=owner)

    assert stamp(tree) is None
