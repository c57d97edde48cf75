"""What already has the name of our index: ours is mended, anything else is left as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from openmemory_migrations.marks import SET_ASIDE
from openmemory_migrations.target import NEWER_INDEX
from tests.support.commands import alembic, om
from tests.support.databases import Databases
from tests.support.native import create_newer
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.preflight import check
from tests.support.scripts import DIM8, SINGLE, offline
from tests.support.states import BACKFILL, INDEX, INVALIDATE, SECOND_INDEX, State, column_type, indexes, snapshot

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

DIM = 8


def create(name: str, definition: str = "ivfflat (v_vector vector_l2_ops) WITH (lists = 1)", table: str = TABLE) -> str:
    return f"CREATE INDEX {name} ON {table} USING {definition};"


def at_backfill(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, DIM))
    alembic(database, "upgrade", BACKFILL)


@pytest.fixture
def backfilled(databases: Databases) -> Iterator[Database]:
    """Sixty rows, converted, before the step that builds the index."""
    with databases.copy(at_backfill) as database:
        yield database


@pytest.fixture(scope="module")
def fresh(databases: Databases) -> State:
    """The state that our chain alone leaves."""
    with databases.copy(at_backfill) as database:
        alembic(database, "upgrade", "head")
        return snapshot(database)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(create(INDEX) + INVALIDATE, id="first invalid"),
        pytest.param(create(SECOND_INDEX) + INVALIDATE, id="second invalid"),
        pytest.param(create(INDEX) + create(SECOND_INDEX) + INVALIDATE, id="both invalid"),
        pytest.param(create(INDEX) + INVALIDATE + ";" + create(SECOND_INDEX), id="first invalid, second valid"),
        pytest.param(create(SECOND_INDEX) + INVALIDATE + ";" + create(INDEX), id="first valid, second invalid"),
        pytest.param(create(INDEX, "hnsw (v_vector vector_ip_ops)") + INVALIDATE, id="invalid, of another definition"),
        pytest.param(create(INDEX) + create(SECOND_INDEX), id="both valid"),
        pytest.param(create(SECOND_INDEX), id="second valid"),
        pytest.param(create(INDEX), id="first valid"),
    ],
)
def test_indexes_on_our_own_column_end_as_one_that_is_valid(backfilled: Database, fresh: State, found: str) -> None:
    backfilled.run(found)

    alembic(backfilled, "upgrade", "head")

    assert snapshot(backfilled) == fresh


@pytest.mark.parametrize("env", [{"OM_INDEX": "none"}, {"OM_INDEX_MEMORY": "1MB", "OM_INDEX_LISTS": "500"}])
def test_an_invalid_index_goes_even_where_no_other_takes_its_place(backfilled: Database, env: dict[str, str]) -> None:
    backfilled.run(create(INDEX) + INVALIDATE)

    alembic(backfilled, "upgrade", "head", env=env)

    # pgvector 0.6.2 needs less memory than that, and builds it
    assert all(valid for _, valid in indexes(backfilled).values())


def test_an_index_that_became_invalid_is_built_anew_after_a_stamp(backfilled: Database, fresh: State) -> None:
    alembic(backfilled, "upgrade", "head")
    backfilled.run(INVALIDATE)
    alembic(backfilled, "stamp", BACKFILL)

    result = alembic(backfilled, "upgrade", "head")

    assert f'NOTICE:  index "{INDEX}" is invalid' in result.stderr
    assert snapshot(backfilled) == fresh


@pytest.mark.parametrize(
    "taken",
    [
        pytest.param(
            "CREATE TABLE other (v_vector vector(8));" + create(INDEX, table="other"),
            id="vector index of another table",
        ),
        pytest.param(
            "CREATE TABLE other (v_vector vector(8));" + create(INDEX, table="other") + INVALIDATE,
            id="invalid vector index of another table",
        ),
        pytest.param(f"CREATE TABLE other (id int); CREATE INDEX {INDEX} ON other (id)", id="index of another table"),
        pytest.param(f"CREATE TABLE {INDEX} (id int)", id="a table"),
        pytest.param(create(INDEX, "hnsw (v_vector vector_cosine_ops)"), id="another definition"),
        pytest.param(create(INDEX, "btree (dim)"), id="another column"),
        pytest.param(create(INDEX).replace(";", " WHERE sector = 'semantic';"), id="partial"),
    ],
)
def test_what_already_has_the_name_of_our_index_is_left_as_it_is_with_a_warning(
    backfilled: Database, taken: str
) -> None:
    backfilled.run(taken)
    before = snapshot(backfilled)

    result = alembic(backfilled, "upgrade", "head")

    assert snapshot(backfilled) == before
    assert "WARNING:  " in result.stderr
    assert f'"{INDEX}"' in result.stderr.split("WARNING:  ")[1].splitlines()[0]
    assert "searches use index" not in result.stderr


@pytest.mark.parametrize(
    ("taken", "holder"),
    [
        (f"CREATE TABLE other (id int); CREATE INDEX {INDEX} ON other (id)", "an index of another table"),
        (f"CREATE TABLE {INDEX} (id int)", "something that is no index"),
        (create(INDEX, "btree (dim)"), "a btree index on dim"),
        (
            create(INDEX).replace(";", " WHERE sector = 'semantic';"),
            "a ivfflat index on v_vector, for some of the rows",
        ),
    ],
)
@pytest.mark.parametrize("how", ["check", "upgrade", "index", "script", "script in one transaction"])
def test_who_has_the_name_of_our_index_is_said_alike(
    server: Server, backfilled: Database, taken: str, holder: str, how: str
) -> None:
    backfilled.run(taken)
    before = snapshot(backfilled)

    if how == "check":
        said = om(backfilled, "check").stdout
    elif how == "upgrade":
        said = alembic(backfilled, "upgrade", "head").log
    elif how == "index":
        said = om(backfilled, "index").log
    else:
        single = SINGLE if how.endswith("transaction") else {}
        said = offline(server, backfilled, "upgrade", f"{BACKFILL}:head", env=DIM8 | single).stderr

    assert f'no index: the name "{INDEX}" is taken by {holder}\n' in said
    assert "HINT:  Rename that, then: openmemory-migrations index." in said
    assert snapshot(backfilled) == before


def test_an_index_that_somebody_builds_anew_keeps_nobody_from_asking_its_name(
    server: Server, backfilled: Database
) -> None:
    backfilled.run(f"CREATE TABLE other (id int); CREATE INDEX {INDEX} ON other (id)")
    with closing(backfilled.connect()) as holder, holder.cursor() as cursor:
        holder.autocommit = False
        cursor.execute(f"REINDEX INDEX {INDEX}")

        said = [
            om(backfilled, "check").stdout,
            offline(server, backfilled, "upgrade", f"{BACKFILL}:head", env=DIM8).stderr,
        ]

    for text in said:
        assert f'no index: the name "{INDEX}" is taken by an index of another table' in text


@pytest.mark.parametrize(
    ("before", "env"),
    [
        ("", {"OM_INDEX": "none"}),
        (f"DELETE FROM {TABLE}", {}),
        (f"ALTER TABLE {TABLE} ADD v_vector_adopted vector(8)", {}),
    ],
    ids=["none wanted", "too few rows", "an adopted column"],
)
def test_check_asks_for_its_name_only_where_an_index_is_to_be_built(
    backfilled: Database, before: str, env: dict[str, str]
) -> None:
    on = "v_vector_adopted" if "adopted" in before else "id"
    if "DELETE" in before:
        alembic(backfilled, "downgrade", "base")
    backfilled.run(f"{before}; CREATE TABLE other (id int)" if before else "CREATE TABLE other (id int)")
    if "adopted" in before:
        backfilled.run(f"COMMENT ON COLUMN {TABLE}.v_vector_adopted IS '{SET_ASIDE}'")
        backfilled.run(create(INDEX, f"hnsw ({on} vector_l2_ops)"))
    else:
        backfilled.run(f"CREATE INDEX {INDEX} ON other ({on})")

    assert "index-name" not in [one["code"] for one in check(backfilled, 0, env=DIM8 | env)["findings"]]


def test_check_asks_for_the_name_of_the_index_on_a_table_of_vectors_too(backfilled: Database) -> None:
    backfilled.run(f"DROP TABLE {TABLE}")
    create_newer(backfilled, random_rows(60, DIM))
    backfilled.run(f"CREATE TABLE {NEWER_INDEX} (id int)")

    assert "index-name" in [one["code"] for one in check(backfilled, 0, env=DIM8)["findings"]]


def test_the_hint_for_another_definition_leads_to_the_wanted_one(backfilled: Database, fresh: State) -> None:
    backfilled.run(create(INDEX, "hnsw (v_vector vector_cosine_ops)"))
    result = alembic(backfilled, "upgrade", "head")
    assert "HINT:  For the wanted one: openmemory-migrations index." in result.stderr

    assert om(backfilled, "index").returncode == 0

    assert snapshot(backfilled) == fresh


@pytest.mark.parametrize("on", ["w", "v_vector"])
def test_a_vector_index_that_serves_nothing_is_no_index_of_ours(backfilled: Database, on: str) -> None:
    """On another column, or of some rows: not fine, and not dropped."""
    alembic(backfilled, "upgrade", "head", env={"OM_INDEX": "none"})
    backfilled.run(f"ALTER TABLE {TABLE} ADD w vector({DIM})")
    some = "" if on == "w" else " WHERE sector = 'semantic'"
    backfilled.run(f"CREATE INDEX {INDEX} ON {TABLE} USING hnsw ({on} vector_l2_ops){some}")
    status = om(backfilled, "status")
    assert status.returncode == 1
    assert re.search(r"index: +missing", status.stdout)

    refused = om(backfilled, "index")
    assert refused.returncode == 1
    assert f'the name "{INDEX}" is taken by a hnsw index on {on}' in refused.log
    om(backfilled, "index", "-x", "index=none")
    assert backfilled.value("SELECT indisvalid FROM pg_index WHERE indexrelid = %s::regclass", INDEX)

    backfilled.run(f"ALTER INDEX {INDEX} RENAME TO theirs")
    om(backfilled, "index")
    assert om(backfilled, "status").returncode == 0


def test_another_definition_under_the_second_name_stays_beside_ours(backfilled: Database) -> None:
    backfilled.run(create(SECOND_INDEX, "ivfflat (v_vector vector_cosine_ops) WITH (lists = 1)"))
    (theirs,) = indexes(backfilled).values()

    alembic(backfilled, "upgrade", "head")

    assert indexes(backfilled)[SECOND_INDEX] == theirs
    assert indexes(backfilled)[INDEX][1]


def test_a_downgrade_leaves_the_index_of_another_table_under_our_name(backfilled: Database) -> None:
    backfilled.run("CREATE TABLE other (v_vector vector(8));" + create(INDEX, table="other"))
    alembic(backfilled, "upgrade", "head")

    alembic(backfilled, "downgrade", "base")

    assert indexes(backfilled, "other")[INDEX][1]
    assert column_type(backfilled) is None
