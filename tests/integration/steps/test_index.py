"""The index as it is configured, where there can be none, and what a downgrade would lose."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from demo.openmemory import TABLE
from tests.support.commands import alembic, om
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.states import EXPAND, HEAD, INDEX, column_type, indexes, nearest, plan, snapshot, stamp

ON = f"CREATE INDEX {INDEX} ON public.{TABLE} USING"
HNSW_OPTIONS = {"OM_INDEX_M": "8", "OM_INDEX_EF_CONSTRUCTION": "40"}


def filled(database: Database, count: int, dim: int = 8) -> None:
    create_table(database)
    load(database, random_rows(count, dim))


def pgvector(database: Database) -> tuple[int, ...]:
    version = database.value("SELECT default_version FROM pg_available_extensions WHERE name = 'vector'")
    return tuple(map(int, version.split(".")))


def logged_query(log: str, dim: int) -> str:
    """Return the ORDER BY that the log recommends, with a vector for its parameter."""
    (query,) = re.findall(r"searches use index .* when they say: (ORDER BY .*) LIMIT", log)
    return str(query).replace("$1", f"'[{','.join(['1'] * dim)}]'")


@pytest.mark.parametrize(
    ("env", "definition"),
    [
        ({"OM_INDEX": "ivfflat", "OM_INDEX_LISTS": "7"}, "ivfflat (v_vector {}) WITH (lists='7')"),
        ({"OM_INDEX": "hnsw", **HNSW_OPTIONS}, "hnsw (v_vector {}) WITH (m='8', ef_construction='40')"),
    ],
    ids=["ivfflat", "hnsw"],
)
@pytest.mark.parametrize(("metric", "operator"), [("l2", "<->"), ("cosine", "<=>"), ("ip", "<#>")])
def test_the_index_is_as_configured(
    database: Database, env: Mapping[str, str], definition: str, metric: str, operator: str
) -> None:
    filled(database, 60)

    result = alembic(database, "upgrade", "head", env={**env, "OM_INDEX_METRIC": metric})

    # the server leaves out the class that is the method's default
    definition = definition.format(f"vector_{metric}_ops").replace(
        "ivfflat (v_vector vector_l2_ops)", "ivfflat (v_vector)"
    )
    assert indexes(database) == {INDEX: (f"{ON} {definition}", True)}
    assert f"Index Scan using {INDEX}" in plan(database, nearest(8, operator))
    assert f"Index Scan using {INDEX}" in plan(database, logged_query(result.stderr, 8))


@pytest.mark.parametrize(
    ("count", "env", "definition"),
    [
        (50, {}, "ivfflat (v_vector) WITH (lists='1')"),
        (2500, {}, "ivfflat (v_vector) WITH (lists='2')"),
        (
            0,
            {"OM_INDEX": "hnsw", "OM_VEC_DIM": "8"},
            "hnsw (v_vector vector_l2_ops) WITH (m='16', ef_construction='64')",
        ),
        (0, {"OM_INDEX_LISTS": "3", "OM_VEC_DIM": "8"}, "ivfflat (v_vector) WITH (lists='3')"),
    ],
)
def test_the_rows_decide_what_is_not_configured(
    database: Database, count: int, env: Mapping[str, str], definition: str
) -> None:
    filled(database, count)

    alembic(database, "upgrade", "head", env=env)

    assert indexes(database) == {INDEX: (f"{ON} {definition}", True)}


@pytest.mark.parametrize(
    ("count", "dim", "env", "reason"),
    [
        (49, 8, {}, "ivfflat needs 50 rows to learn from, there are 49"),
        (0, 8, {"OM_VEC_DIM": "8"}, "ivfflat needs 50 rows to learn from, there are 0"),
        (60, 8, {"OM_INDEX": "none"}, "OM_INDEX is none"),
        (60, 4001, {}, "no index of pgvector takes more than 4,000 dimensions"),
        (3, 4001, {"OM_INDEX": "hnsw"}, "no index of pgvector takes more than 4,000 dimensions"),
    ],
)
def test_where_there_is_no_index_the_log_says_why_and_nothing_fails(
    database: Database, count: int, dim: int, env: Mapping[str, str], reason: str
) -> None:
    filled(database, count, dim)

    result = alembic(database, "upgrade", "head", env=env)

    level = "NOTICE" if count < 50 or env.get("OM_INDEX") == "none" else "WARNING"
    if "4,000" in reason:
        level = "WARNING"
    assert f'{level}:  no index on "v_vector" of "public.{TABLE}": {reason}' in result.stderr
    assert "searches use index" not in result.stderr
    assert indexes(database) == {}
    assert column_type(database) == f"vector({dim})"
    assert mismatches(database) == []
    assert stamp(database) == [HEAD]


def test_a_table_too_small_for_ivfflat_gets_its_index_later_by_the_hint(database: Database) -> None:
    filled(database, 49)
    result = alembic(database, "upgrade", "head")
    assert "HINT:  When there are more rows: openmemory-migrations index." in result.stderr
    load(database, random_rows(1, 8, seed=1))

    assert om(database, "index").returncode == 0

    assert indexes(database) == {INDEX: (f"{ON} ivfflat (v_vector) WITH (lists='1')", True)}


@pytest.mark.parametrize(
    ("dim", "env", "opclass"),
    [
        (2000, {}, None),
        (2001, {}, "halfvec_l2_ops"),
        (2001, {"OM_INDEX": "hnsw", "OM_INDEX_METRIC": "ip"}, "halfvec_ip_ops"),
        (4000, {"OM_INDEX": "hnsw", "OM_INDEX_METRIC": "cosine"}, "halfvec_cosine_ops"),
        (384, {"OM_INDEX": "hnsw", "OM_INDEX_HALFVEC": "on"}, "halfvec_l2_ops"),
    ],
)
def test_above_2000_dimensions_or_when_wanted_the_index_is_on_halfvec_and_the_logged_query_uses_it(
    database: Database, dim: int, env: Mapping[str, str], opclass: str | None
) -> None:
    if pgvector(database) < (0, 7):
        pytest.skip("halfvec came with pgvector 0.7")
    filled(database, 60, dim)

    result = alembic(database, "upgrade", "head", env=env)

    ((definition, valid),) = indexes(database).values()
    assert valid
    if opclass:
        assert f"(((v_vector)::halfvec({dim})) {opclass})" in definition
    else:
        assert "(v_vector)" in definition
    assert f"Index Scan using {INDEX}" in plan(database, logged_query(result.stderr, dim))


def test_above_2000_dimensions_an_old_pgvector_builds_none_and_says_why(database: Database) -> None:
    if pgvector(database) >= (0, 7):
        pytest.skip("pgvector has halfvec")
    filled(database, 60, 2001)

    result = alembic(database, "upgrade", "head")

    assert "more than 2,000 dimensions need halfvec" in result.stderr
    assert indexes(database) == {}
    assert stamp(database) == [HEAD]


def test_too_little_memory_for_the_build_is_a_warning_with_the_next_step(database: Database) -> None:
    filled(database, 60, 384)

    result = alembic(database, "upgrade", "head", env={"OM_INDEX_MEMORY": "1MB"})

    assert re.search(
        "^WARNING:  no index on .*: ivfflat needs \\d+ MB of memory even for one list", result.stderr, re.M
    )
    assert re.search(r"^HINT:  .*OM_INDEX_MEMORY=\d+MB, .*, then: openmemory-migrations index\.", result.stderr, re.M)
    assert "searches use index" not in result.stderr
    assert indexes(database) == {}
    assert mismatches(database) == []
    assert stamp(database) == [HEAD]

    assert om(database, "index").returncode == 0
    assert indexes(database) == {INDEX: (f"{ON} ivfflat (v_vector) WITH (lists='1')", True)}


@pytest.mark.slow
def test_a_downgrade_that_would_lose_values_is_refused_with_their_count(database: Database) -> None:
    filled(database, 60)
    before = snapshot(database)["columns"]
    alembic(database, "upgrade", "head")
    vector = "'[1,2,3,4,5,6,7,8]'"
    for v in ("NULL", "NULL", "'abc'"):
        database.run(
            f"INSERT INTO {TABLE} (id, sector, v, dim, v_vector) VALUES (gen_random_uuid(), 'own', {v}, 8, {vector})"
        )

    for accepted in ("0", "2"):
        result = alembic(database, "downgrade", "base", env={"OM_ACCEPT_LOSS": accepted}, check=False)
        assert result.returncode != 0
        assert "FAILED: 3 values" in result.log
        assert "OM_ACCEPT_LOSS=3" in result.log
        assert stamp(database) == [EXPAND]
        assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector = {vector}") == 3

    alembic(database, "-x", "accept_loss=3", "downgrade", "base")
    assert snapshot(database)["columns"] == before
    assert stamp(database) == []
