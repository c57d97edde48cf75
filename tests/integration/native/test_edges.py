"""A `v` of newer OpenMemory in other tables: partitioned, a host's, with things that hang on it, with long vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from psycopg2.errors import ProgramLimitExceeded

from demo.openmemory import TABLE
from openmemory_migrations import ops
from tests.support.commands import alembic, om
from tests.support.native import INDEX, NEWER, START, create_newer, text, wrong
from tests.support.openmemory import Database, load, random_rows
from tests.support.preflight import check, finding
from tests.support.states import (
    BACKFILL,
    EXPAND,
    HEAD,
    column_type,
    indexes,
    refused,
    snapshot,
    stamp,
    without_extension,
)

NAME = f'"public.{TABLE}"'
pytestmark = pytest.mark.slow
TREE = f"""
CREATE TABLE {TABLE} (old text, id uuid, sector text, user_id text, project_id text, v vector, dim integer NOT NULL,
                      PRIMARY KEY (id, sector)) PARTITION BY LIST (sector);
ALTER TABLE {TABLE} DROP old;
CREATE TABLE episodic PARTITION OF {TABLE} FOR VALUES IN ('episodic');
CREATE TABLE semantic (v vector, dim integer NOT NULL, project_id text, user_id text, id uuid, sector text,
                       PRIMARY KEY (id, sector));
ALTER TABLE {TABLE} ATTACH PARTITION semantic FOR VALUES IN ('semantic');
CREATE TABLE rest PARTITION OF {TABLE} DEFAULT PARTITION BY HASH (id);
CREATE TABLE rest_0 PARTITION OF rest FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE rest_1 PARTITION OF rest FOR VALUES WITH (MODULUS 2, REMAINDER 1);
"""
LEAVES = ("episodic", "semantic", "rest_0", "rest_1")


@pytest.mark.parametrize("rows", [0, 500])
def test_a_partitioned_table(database: Database, rows: int) -> None:
    data = random_rows(rows, 8)
    create_newer(database, data, TREE)
    before = snapshot(database)

    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": "8"})

    assert {column_type(database, "v", part) for part in (TABLE, "rest", *LEAVES)} == {"vector(8)"}
    assert column_type(database, "v_typed") is None
    assert indexes(database)[INDEX][1]
    assert all(len(indexes(database, part)) == 1 for part in LEAVES)
    database.run(START)
    assert wrong(database, data) == []
    alembic(database, "downgrade", "base")
    assert {column_type(database, "v", part) for part in (TABLE, "rest", *LEAVES)} == {"vector"}
    assert wrong(database, data) == []
    if not rows:
        assert without_extension(snapshot(database)) == without_extension(before)
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": "8"})
    assert wrong(database, data) == []


HANGING = [
    pytest.param(f"CREATE VIEW shown AS SELECT id, v FROM {TABLE}", "view public.shown", id="view"),
    pytest.param(
        f"CREATE INDEX own ON {TABLE} USING hnsw ((v::vector(8)) vector_l2_ops)", "index public.own", id="index"
    ),
    pytest.param(
        f"ALTER TABLE {TABLE} ADD whole real[] GENERATED ALWAYS AS (v::real[]) STORED", "whole", id="generated"
    ),
]


@pytest.mark.parametrize("rows", [0, 20])
@pytest.mark.parametrize(("sql", "said"), HANGING)
def test_what_hangs_on_v_is_named_before_any_change(database: Database, rows: int, sql: str, said: str) -> None:
    create_newer(database, random_rows(rows, 8))
    database.run(sql)

    refused(database, said, "Drop that", env={"OM_VEC_DIM": "8"})


@pytest.mark.exhaustive
def test_what_hangs_on_v_by_the_time_that_it_is_replaced_is_named(database: Database) -> None:
    rows = random_rows(20, 8)
    create_newer(database, rows)
    alembic(database, "upgrade", EXPAND)
    database.run(f"CREATE VIEW shown AS SELECT id, v FROM {TABLE}")

    refused(database, "view public.shown", "Drop that")

    database.run("DROP VIEW shown")
    alembic(database, "upgrade", "head")
    assert wrong(database, rows) == []


def test_an_index_of_somebody_elses_keeps_the_dimensions(database: Database) -> None:
    rows = random_rows(60, 8)
    create_newer(database, rows)
    alembic(database, "upgrade", "head")
    database.run(f"CREATE INDEX own ON {TABLE} USING ivfflat (v vector_l2_ops) WITH (lists = 1)")
    alembic(database, "downgrade", EXPAND)
    assert list(indexes(database)) == ["own"]
    database.run(START)  # newer OpenMemory has started meanwhile

    refused(database, "index public.own", "Drop that", command=("downgrade", "base"))

    database.run("DROP INDEX own")
    alembic(database, "downgrade", "base")
    assert indexes(database) == {}
    assert column_type(database, "v") == "vector"
    assert wrong(database, rows) == []


@pytest.mark.exhaustive
def test_a_column_of_the_name_that_ours_has_is_named(database: Database) -> None:
    create_newer(database, random_rows(20, 8))
    database.run(f"ALTER TABLE {TABLE} ADD v_typed text")

    refused(database, 'has a column "v_typed" that is not this package\'s')


@pytest.mark.exhaustive
def test_a_role_that_is_not_the_owner(database: Database) -> None:
    create_newer(database)
    role = f"stranger_{database.name}"
    database.run(f"CREATE ROLE {role} LOGIN; GRANT ALL ON {TABLE} TO {role}; GRANT ALL ON SCHEMA public TO {role}")
    stranger = Database(database.name, database.url.replace("postgres@", f"{role}@"))
    try:
        refused(database, f"does not own table {NAME}", env={"OM_VEC_DIM": "8"}, by=stranger)
    finally:
        database.run(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_role_that_may_not_create_the_version_table_is_told_before(database: Database) -> None:
    create_newer(database)
    role = f"owner_{database.name}"
    database.run(f"CREATE ROLE {role} LOGIN; ALTER TABLE {TABLE} OWNER TO {role}")
    database.run(f"ALTER TABLE {TABLE} ALTER v TYPE vector(8); REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    owner = Database(database.name, database.url.replace("postgres@", f"{role}@"))
    try:
        one = finding(check(owner, 1), "rights")
        assert "may not create the version table" in one["message"]
        database.run(one["hint"])
        check(owner, 0)
        alembic(owner, "upgrade", "head")
    finally:
        database.run(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_rows_that_came_before_the_trigger_are_named(database: Database) -> None:
    create_newer(database, random_rows(20, 8))
    alembic(database, "upgrade", EXPAND)
    database.run(f"ALTER TABLE {TABLE} DISABLE TRIGGER USER")
    load(database, [row._replace(v=text(row.v)) for row in random_rows(3, 9, seed=1)])  # type: ignore[arg-type]

    done = alembic(database, "upgrade", "head", check=False)

    assert done.returncode != 0
    assert "FAILED: 3 rows of" in done.log
    assert "refused with SQLSTATE 22000" in done.log
    assert "HINT:  Delete or mend those rows" in done.log
    database.run(f"DELETE FROM {TABLE} WHERE dim = 9")
    alembic(database, "upgrade", "head")
    assert wrong(database, random_rows(20, 8)) == []


@pytest.mark.exhaustive
def test_a_value_that_is_stale_is_found(database: Database) -> None:
    rows = random_rows(20, 8)
    create_newer(database, rows)
    alembic(database, "upgrade", EXPAND)
    database.run(f"UPDATE {TABLE} SET v_typed = '[1,2,3,4,5,6,7,8]' WHERE id = %s", rows[0].id)

    done = alembic(database, "upgrade", "head", check=False)

    assert "FAILED: 1 rows of" in done.log
    assert column_type(database, "v") == "vector"
    alembic(database, "downgrade", "om_20240107_pgvector-1")
    alembic(database, "upgrade", "head")
    assert wrong(database, rows) == []


def test_more_than_2000_dimensions(database: Database) -> None:
    create_newer(database, random_rows(20, 2100))
    if database.value("SELECT extversion < '0.7' FROM pg_extension WHERE extname = 'vector'"):
        pytest.skip("halfvec came with pgvector 0.7.0")

    up = alembic(database, "upgrade", "head")

    assert "CREATE INDEX can't work with more than 2,000 dimensions" in up.stderr
    assert "halfvec_cosine_ops" in indexes(database)[INDEX][0]
    database.run(START)  # as the log says, it makes none and starts
    alembic(database, "downgrade", BACKFILL)
    with pytest.raises(ProgramLimitExceeded):
        database.run(START)
    assert "It starts only where" in alembic(database, "upgrade", "head", env={"OM_INDEX": "none"}).stderr


@pytest.mark.parametrize(
    ("env", "said", "built"),
    [
        ({"OM_INDEX": "none"}, "OM_INDEX is none", None),
        ({"OM_INDEX": "ivfflat"}, "ivfflat needs 50 rows to learn from, there are 20", None),
        ({"OM_INDEX_METRIC": "ip", "OM_INDEX_M": "5"}, "<#>", "(v vector_ip_ops) WITH (m='5'"),
    ],
)
def test_another_index_on_v(database: Database, env: dict[str, str], said: str, built: str | None) -> None:
    create_newer(database, random_rows(20, 8))

    up = alembic(database, "upgrade", "head", env=env)

    assert said in up.stderr
    assert stamp(database) == [HEAD]
    assert (built or "") in str(indexes(database).get(INDEX))
    assert (INDEX in indexes(database)) == bool(built)


def test_a_table_with_odd_names(database: Database) -> None:
    schema, table = 'od"d: s%', "t'a \"b$function$" + "x" * 45
    quoted = ".".join('"' + name.replace('"', '""') + '"' for name in (schema, table))
    database.run('CREATE SCHEMA "od""d: s%"; CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions')
    database.run(NEWER.replace(TABLE, quoted).replace("v vector", "v extensions.vector"))
    database.run(f"INSERT INTO {quoted} SELECT gen_random_uuid(), 'semantic', 'u', 'p', '[1,2,3]', 3")
    env = {"OM_PG_SCHEMA": schema, "OM_VECTOR_TABLE": table}

    for command in (("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")):
        alembic(database, *command, env=env)
        assert database.value(f"SELECT v::text FROM {quoted}") == "[1,2,3]"

    assert column_type(database, "v", table, schema) == "extensions.vector(3)"
    assert list(indexes(database, table, schema)) == [INDEX]


def test_a_hosts_own_column(database: Database) -> None:
    """With all options of ops, in the host's own transaction."""
    database.run("CREATE EXTENSION vector; CREATE TABLE chunks (id integer PRIMARY KEY, embedding vector)")
    database.run("INSERT INTO chunks SELECT i, ARRAY[i, 1, 2]::vector FROM generate_series(1, 100) AS i")
    before = snapshot(database)
    engine = sa.create_engine(database.url.replace("postgresql://", "postgresql+psycopg2://"))

    def run(*steps: Callable[..., None]) -> None:
        with (
            engine.connect() as connection,
            Operations.context(MigrationContext.configure(connection)),
            connection.begin(),
        ):
            for one in steps:
                one(schema="public", table="chunks", column="embedding", vector_column="vector", index="ivfflat")

    run(ops.upgrade_expand, ops.upgrade_backfill, ops.upgrade_finalize)
    assert column_type(database, "embedding", "chunks") == "vector(3)"
    built, valid = indexes(database, "chunks")["chunks_embedding_idx"]
    assert valid
    assert "USING ivfflat (embedding vector_cosine_ops)" in built
    run(ops.downgrade_finalize, ops.downgrade_backfill, ops.downgrade_expand)
    engine.dispose()
    assert snapshot(database) == before


def test_a_rule_that_keeps_updates_away_ends_in_an_error(database: Database) -> None:
    rows = random_rows(20, 8)
    create_newer(database, rows)
    database.run(f"CREATE RULE never AS ON UPDATE TO {TABLE} DO INSTEAD NOTHING")
    assert '"never"' in om(database, "check").stdout

    done = alembic(database, "upgrade", "head", check=False)

    assert 'FAILED: rule "never" on public.openmemory_vectors rewrites each UPDATE' in done.log
    database.run(f"ALTER TABLE {TABLE} DISABLE RULE never")
    alembic(database, "upgrade", "head")
    assert wrong(database, rows) == []
