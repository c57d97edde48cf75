"""A partitioned table is cut over as one, whatever is below it."""

from __future__ import annotations

import pytest

from demo.openmemory import TABLE

from .cutover import both_modes, bytes_of, changed, cut_over, refuses, undo, vectors_of, whole
from .helpers import Database, alembic, expected, load
from .partitioned import BAD, DIM, ENV, assert_followed, tree, vector_indexes

__all__ = ["tree"]  # a fixture

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

ACCEPTED = {**ENV, "OM_ACCEPT_LOSS": str(sum(row.v is not None for row in BAD))}
FILES = "SELECT oid::regclass::text, pg_relation_filenode(oid) FROM pg_class WHERE relkind = 'r' AND relname !~ '^pg_'"


@both_modes
def test_a_tree_is_cut_over_and_back(tree: Database, mode: str) -> None:
    load(tree, BAD)
    tree.run(f"GRANT SELECT (v) ON {TABLE} TO PUBLIC; GRANT UPDATE (v) ON procedural_low TO PUBLIC")
    alembic(tree, "upgrade", "head", env=ENV)
    before, v, files = whole(tree), bytes_of(tree), dict(tree.rows(FILES))
    sync = f"{TABLE}_vvector_sync"
    tree.run(f"ALTER TABLE procedural_low DISABLE TRIGGER {sync}")
    refuses(tree, f'trigger "{sync}" of "public.{TABLE}" is missing or disabled', mode=mode, env=ACCEPTED)
    tree.run(f"ALTER TABLE procedural_low ENABLE TRIGGER {sync}")

    cut_over(tree, mode, ACCEPTED)

    vector = "v" if mode == "swap" else "v_vector"
    assert vectors_of(tree, vector) == {key: expected(value, DIM) for key, value in v.items()}
    now = dict(tree.rows(FILES))
    assert {name: now[name] for name in files} == files
    # newer OpenMemory's index is beside our own, on every part
    each = {len(found) for found in vector_indexes(tree).values()}
    assert each == ({2} if mode == "swap" else {1})
    assert all(valid for found in vector_indexes(tree).values() for valid, *_ in found)
    assert not tree.rows("SELECT relname FROM pg_class WHERE relname ~ 'left'")
    undo(tree)
    assert bytes_of(tree) == v
    assert not changed(before, whole(tree))
    assert_followed(tree)
