"""Databases where OpenMemory's SQL was applied by hand end as if only our chain had ever run."""

from __future__ import annotations

import itertools

import pytest

from demo.openmemory import TABLE
from tests.support.adopted import DIM, EXPAND_SQL, FILL, OWN, ROWS, SCRIPTS, by_hand, with_sourceless
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.openmemory import Database, checksum, create_table, load, mismatches
from tests.support.states import (
    EXPAND,
    INDEX,
    INVALIDATE,
    SECOND_INDEX,
    State,
    column_type,
    follows,
    indexes,
    refused,
    snapshot,
    stamp,
    without_extension,
)

NAME = f'"public.{TABLE}"'

COMBINATIONS = [
    (script, fill, valid)
    for script, fill, valid in itertools.product(SCRIPTS, FILL, [True, False])
    if valid or (script.endswith(("index", "indexes")) and "no index" not in script)
]
REPRESENTATIVE = [
    ("no dimension", "half", True),
    ("no dimension", "empty", True),
    ("dimension, no index", "wholly", True),
    ("second index", "wholly", True),
    ("second index", "half", False),
    ("first index", "stale", True),
    ("both indexes", "wholly", True),
    ("both indexes", "stale", False),
]


@pytest.fixture(scope="module")
def fresh(databases: Databases) -> State:
    """The state that our chain alone leaves."""
    with databases.empty() as database:
        create_table(database)
        load(database, ROWS)
        alembic(database, "upgrade", "head")
        return snapshot(database)


@pytest.mark.parametrize(
    ("script", "fill", "valid"),
    [
        pytest.param(
            *case, marks=[] if case in REPRESENTATIVE else pytest.mark.slow, id=f"{case[0]}, {case[1]}, {case[2]}"
        )
        for case in COMBINATIONS
    ],
)
def test_what_was_done_by_hand_ends_as_a_fresh_run(
    database: Database, fresh: State, script: str, fill: str, valid: bool
) -> None:
    by_hand(database, SCRIPTS[script], fill)
    if not valid:
        database.run(INVALIDATE)
    made = indexes(database)
    assert [name in made for name in (INDEX, SECOND_INDEX)] == [
        script in ("first index", "both indexes"),
        script in ("second index", "both indexes"),
    ]
    v = checksum(database)

    alembic(database, "upgrade", "head")

    assert mismatches(database, dim=DIM) == []
    assert checksum(database) == v
    assert follows(database, DIM)
    assert snapshot(database) == fresh


@pytest.mark.parametrize("script", ["no dimension", "both indexes"])
def test_an_empty_table_is_adopted_as_a_fresh_one_is_migrated(database: Database, script: str) -> None:
    by_hand(database, SCRIPTS[script], rows=[])

    alembic(database, "upgrade", "head")

    assert column_type(database) == "vector"
    assert column_type(database, "v_vector_adopted") is None
    assert indexes(database) == {}
    assert follows(database, DIM)


@pytest.mark.parametrize("script", ["no dimension", "second index"])
def test_values_without_source_are_carried_over_to_the_bit(database: Database, script: str) -> None:
    with_sourceless(database, SCRIPTS[script], [OWN, OWN, "'[0,0,0,0,0,0,0,0]'"])
    own = f"SELECT id, vector_send(v_vector) FROM {TABLE} WHERE sector = 'own' ORDER BY id"
    before = [(id, bytes(sent)) for id, sent in database.rows(own)]
    v = checksum(database)

    result = alembic(database, "upgrade", "head")

    assert [(id, bytes(sent)) for id, sent in database.rows(own)] == before
    assert len(mismatches(database, dim=DIM)) == 3
    assert checksum(database) == v
    assert column_type(database, "v_vector_adopted") is None
    assert 'NOTICE:  3 values without source in "v" carried over' in result.stderr


def test_the_values_without_source_alone_tell_the_dimensions(database: Database) -> None:
    create_table(database)
    database.run(EXPAND_SQL)
    database.run(f"INSERT INTO {TABLE} (id, sector, dim, v_vector) VALUES (gen_random_uuid(), 'own', 8, {OWN})")

    alembic(database, "upgrade", "head")

    assert column_type(database) == f"vector({DIM})"
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector = {OWN}") == 1


@pytest.mark.parametrize("env", [{}, {"OM_VEC_DIM": "8"}, {"OM_VEC_DIM": "3"}])
def test_values_without_source_of_another_dimension_are_an_error_with_the_histogram(
    database: Database, env: dict[str, str]
) -> None:
    with_sourceless(database, SCRIPTS["no dimension"], [OWN, "'[1,2,3]'", "'[4,5,6]'"])

    said = ["8 dimensions: 60", "vectors of 3 dimensions without v: 2", "vectors of 8 dimensions without v: 1"]
    refused(database, *said, env=env)

    assert stamp(database) is None


@pytest.mark.slow
@pytest.mark.parametrize("script", ["no dimension", "both indexes"])
def test_a_downgrade_before_the_backfill_puts_the_old_column_back(database: Database, script: str) -> None:
    with_sourceless(database, SCRIPTS[script], [OWN])
    before = snapshot(database)
    alembic(database, "upgrade", EXPAND)
    assert column_type(database, "v_vector_adopted") is not None

    alembic(database, "downgrade", "base")

    assert snapshot(database) == before
    assert stamp(database) == []
    # and it is adopted again
    alembic(database, "upgrade", "head")
    assert len(mismatches(database, dim=DIM)) == 1


def test_a_downgrade_before_the_backfill_is_refused_for_values_that_only_the_new_column_has(database: Database) -> None:
    by_hand(database, SCRIPTS["no dimension"])
    alembic(database, "upgrade", EXPAND)
    database.run(f"INSERT INTO {TABLE} (id, sector, dim, v_vector) VALUES (gen_random_uuid(), 'own', 8, {OWN})")

    refused(database, "1 values", "OM_ACCEPT_LOSS=1", command=("downgrade", "base"))


def test_a_downgrade_after_the_backfill_takes_the_column_away(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    before = snapshot(database)
    for script in SCRIPTS["both indexes"]:
        database.run(script)
    alembic(database, "upgrade", "head")

    alembic(database, "downgrade", "base")

    assert without_extension(snapshot(database)) == before


def test_a_view_on_the_column_to_adopt_is_named_before_any_change(database: Database) -> None:
    by_hand(database, SCRIPTS["second index"])
    database.run(f"CREATE VIEW report AS SELECT id, v_vector FROM {TABLE}")

    refused(database, "views show it: public.report", "HINT:  Drop them")

    assert stamp(database) is None
    database.run("DROP VIEW report")
    alembic(database, "upgrade", "head")
    assert mismatches(database, dim=DIM) == []
    assert column_type(database, "v_vector_adopted") is None


@pytest.mark.parametrize("kind", ["text", "bytea", "real[]"])
def test_a_v_vector_of_another_type_is_an_error(database: Database, kind: str) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"ALTER TABLE {TABLE} ADD v_vector {kind}")

    refused(database, f'column "v_vector" of {NAME} is of type {kind}', "HINT:  ")

    assert stamp(database) is None


def test_a_column_named_as_ours_would_be_set_aside_is_an_error(database: Database) -> None:
    by_hand(database, SCRIPTS["no dimension"])
    database.run(f"ALTER TABLE {TABLE} ADD v_vector_adopted text DEFAULT 'mine'")

    refused(database, f'{NAME} has both "v_vector" and "v_vector_adopted"')


def test_a_column_of_that_name_is_never_dropped_where_nothing_was_set_aside(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"ALTER TABLE {TABLE} ADD v_vector_adopted text DEFAULT 'mine'")

    alembic(database, "upgrade", "head", check=False)

    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector_adopted = 'mine'") == 60
