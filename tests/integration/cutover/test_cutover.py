"""The cutover and its undoing, each in its two modes: what there is in between, and that nothing is left afterwards."""

from __future__ import annotations

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import alembic, om
from tests.support.cutover import (
    DIM,
    DOWN,
    ROWS,
    STAMP,
    UNDO,
    UP,
    both_modes,
    bytes_of,
    changed,
    cut_over,
    some_row,
    stamped,
    table,
    text_of,
    undo,
    vectors_of,
    whole,
)
from tests.support.openmemory import (
    Database,
    checksum,
    create_table,
    expected,
    load,
    mismatches,
    random_rows,
    real_rows,
)
from tests.support.scripts import psql
from tests.support.states import HEAD, INDEX, column_type, follows, indexes, plan, refused, stamp, without_extension

__all__ = ["table"]  # a fixture

OF_V = f"FROM pg_attribute WHERE attrelid = '{TABLE}'::regclass AND attname = 'v'"
NEWER_INDEX = "openmemory_vectors_hnsw_idx"


@pytest.mark.parametrize("mode", ["swap", pytest.param("drop", marks=pytest.mark.slow)])
def test_a_table_is_cut_over_and_back_as_if_nothing_had_happened(database: Database, mode: str) -> None:
    dim = 256
    create_table(database)
    load(database, [*real_rows(dim), *random_rows(100, dim)])
    beginning = without_extension(whole(database))
    alembic(database, "upgrade", "head")
    before, v = whole(database), checksum(database)
    rows = {key: value and expected(value) for key, value in bytes_of(database).items()}

    log = cut_over(database, mode).log

    vector = "v" if mode == "swap" else "v_vector"
    assert f'every row of "public.{TABLE}" is verified to the bit: {len(rows)} rows, {len(rows)} equal' in log
    assert f"The way back: {UNDO}." in log
    assert stamped(database) == [STAMP]
    assert vectors_of(database, vector) == rows
    assert column_type(database, vector) == f"vector({dim})"
    assert column_type(database, "v_vector" if mode == "swap" else "v") is None
    assert column_type(database, "v_bytea") == ("bytea" if mode == "swap" else None)
    if mode == "swap":
        assert checksum(database, column="v_bytea") == v
    assert set(indexes(database)) == ({INDEX, NEWER_INDEX} if mode == "swap" else {INDEX})
    assert all(valid for _, valid in indexes(database).values())
    nearest = f"'[{','.join(['1'] * dim)}]'"
    assert f"Index Scan using {INDEX}" in plan(database, f"ORDER BY {vector} <-> {nearest}")
    if mode == "swap":
        assert f"Index Scan using {NEWER_INDEX}" in plan(database, f"ORDER BY {vector} <=> {nearest}")
    between = whole(database)
    # the chain has nothing to do, and isn't taken back
    alembic(database, "upgrade", "head")
    refused(database, "was cut over", UNDO, command=("downgrade", "base"))
    assert not changed(between, whole(database))
    assert stamp(database) == [HEAD]

    undo(database)

    assert checksum(database) == v
    assert not changed(before, whole(database))
    assert stamped(database) == []
    assert follows(database, dim)
    alembic(database, "downgrade", "base")
    assert not changed(beginning, without_extension(whole(database)))


@pytest.mark.slow
def test_a_mode_has_to_be_chosen_and_is_kept_to(table: Database) -> None:
    said = (
        "what the cutover is to do isn't set",
        'OM_CUTOVER=swap: "v_vector" becomes "v", of type vector',
        'OM_CUTOVER=drop: "v" and its bytes go, searches use "v_vector"',
    )
    refused(table, *said, command=UP)
    assert stamped(table) is None
    cut_over(table, "swap")
    table.run("DELETE FROM openmemory_cutover_version")
    refused(
        table, 'the bytes are "v_bytea"', f"For drop first undo that: {UNDO}.", command=UP, env={"OM_CUTOVER": "drop"}
    )
    refused(table, "isn't stamped so", f"upgrade head, which only stamps it; then {UNDO}.", command=DOWN)
    assert "nothing to do" in cut_over(table, "swap").log
    assert stamped(table) == [STAMP]
    ((comment,),) = table.rows(f"SELECT col_description('{TABLE}'::regclass, attnum) {OF_V}")
    for said_now in ("mine", f"{comment}, and mine"):
        table.run(f"COMMENT ON COLUMN {TABLE}.v IS %s", said_now)
        refused(table, 'the comment on column "v"', "isn't what the cutover has put there", command=DOWN)
    table.run(f"COMMENT ON COLUMN {TABLE}.v IS %s", comment)
    refused(table, f"For drop first undo that: {UNDO}.", command=UP, env={"OM_CUTOVER": "drop"})
    refused(table, "was cut over", UNDO, command=("downgrade", "-1"))


@pytest.mark.slow
def test_no_step_of_the_chain_is_taken_back_from_a_table_that_is_cut_over(
    server: embedded.Server, table: Database
) -> None:
    alembic(table, "downgrade", "-1")
    cut_over(table, "swap", {"OM_INDEX": "none"})
    refused(table, "was cut over", UNDO, command=("downgrade", "-1"))
    script = alembic(table, "downgrade", "om_20240107_backfill:om_20240107_pgvector", "--sql", env={"OM_VEC_DIM": "16"})
    done = psql(server, table, script.stdout, check=False)
    assert done.returncode != 0
    assert "was cut over" in done.stderr


@pytest.mark.slow
def test_a_stamp_does_not_hide_a_table_that_was_never_cut_over(table: Database) -> None:
    alembic(table, "-n", "cutover", "stamp", "head")
    said = (f"is stamped {STAMP}", "is not cut over", "alembic -n cutover stamp base")
    refused(table, *said, command=UP, env={"OM_CUTOVER": "swap"})
    create_table(table, "other")
    load(table, ROWS, "other")
    refused(table, '"public.other" is not cut over', command=UP, env={"OM_CUTOVER": "swap", "OM_VECTOR_TABLE": "other"})
    assert "is not cut over, nothing to undo" in undo(table).log
    assert stamped(table) == []


@pytest.mark.slow
def test_the_console_script_does_the_same(table: Database) -> None:
    before = whole(table)

    unset = om(table, "cutover", "upgrade")
    assert unset.returncode == 1
    assert "what the cutover is to do isn't set" in unset.stderr
    assert om(table, "cutover", "upgrade", env={"OM_CUTOVER": "drop"}).returncode == 0

    assert column_type(table, "v") is None
    assert STAMP in om(table, "cutover", "current").stdout
    assert om(table, "cutover", "downgrade").returncode == 0
    assert not changed(before, whole(table))


@pytest.mark.slow
@both_modes
def test_what_is_written_meanwhile_has_its_bytes_afterwards(table: Database, mode: str) -> None:
    """One row of each fate; all others have the bytes that they had."""
    vector = "v" if mode == "swap" else "v_vector"
    new, replacement = random_rows(2, DIM, seed=3)
    (changed_row, where), (gone, where_gone) = some_row(), some_row(ROWS[10:20])
    cleared, where_cleared = some_row(ROWS[20:30])
    before = bytes_of(table)

    cut_over(table, mode)
    table.run(
        f"INSERT INTO {TABLE} (id, sector, user_id, {vector}, dim) VALUES (%s, %s, 'user', %s, {DIM})",
        new.id,
        new.sector,
        text_of(new.v or b""),
    )
    table.run(f"UPDATE {TABLE} SET {vector} = %s WHERE {where}", text_of(replacement.v or b""))
    table.run(f"UPDATE {TABLE} SET {vector} = NULL WHERE {where_cleared}")
    table.run(f"DELETE FROM {TABLE} WHERE {where_gone}")
    if mode == "swap":
        # bytes beside a vector that isn't theirs would be put back
        assert table.value(f"SELECT v_bytea FROM {TABLE} WHERE {where}") is None
        assert table.value(f"SELECT v_bytea FROM {TABLE} WHERE {where_cleared}") is None
    log = undo(table).log

    written = {"swap": '"v" gets an error', "drop": '"v_vector" gets no error, and its rows no bytes'}[mode]
    assert f"A writer that still sends vectors to {written}" in log
    rebuilt = {"swap": 2, "drop": len(ROWS) - 1}[mode]
    assert f'rebuilding "v" of {TABLE}: {rebuilt} of {rebuilt} rows' in log
    del before[gone.id, gone.sector]
    now = before | {
        (new.id, new.sector): new.v,
        (changed_row.id, changed_row.sector): replacement.v,
        (cleared.id, cleared.sector): None,
    }
    assert bytes_of(table) == now
    assert mismatches(table) == []
