"""Databases in which OpenMemory's SQL was applied by hand."""

from __future__ import annotations

from demo.openmemory import TABLE
from tests.support.openmemory import Database, Row, create_table, load, random_rows
from tests.support.states import INDEX, SECOND_INDEX

DIM = 8
ROWS = random_rows(60, DIM)


OWN = "'[1,-0,2,3,4,5,6,1e-45]'"


# OpenMemory's migrations/20240107000000_pgvector.sql, which may fail to index and says so
EXPAND_SQL = f"""
CREATE EXTENSION IF NOT EXISTS vector;
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM information_schema.columns WHERE table_name = '{TABLE}' AND column_name = 'v_vector') THEN
    ALTER TABLE {TABLE} ADD COLUMN v_vector vector;
  END IF;
END $$;
DO $$ BEGIN
  CREATE INDEX IF NOT EXISTS {INDEX} ON {TABLE} USING ivfflat (v_vector vector_l2_ops) WITH (lists = 100);
EXCEPTION WHEN OTHERS THEN RAISE NOTICE 'no ivfflat index: %', SQLERRM;
END $$;
"""


# … and 20240108000000_pgvector_finalize.sql
FINALIZE_SQL = f"""
DO $$ BEGIN
  ALTER TABLE {TABLE} ALTER COLUMN v_vector TYPE vector({DIM});
EXCEPTION WHEN OTHERS THEN RAISE NOTICE 'no dimension: %', SQLERRM;
END $$;
DO $$ BEGIN
  CREATE INDEX IF NOT EXISTS {SECOND_INDEX} ON {TABLE} USING ivfflat (v_vector vector_l2_ops) WITH (lists = 100);
EXCEPTION WHEN OTHERS THEN RAISE NOTICE 'no ivfflat index: %', SQLERRM;
END $$;
"""


# what the old backfill tool left in v_vector
FILL = {
    "empty": "SELECT 1",
    "half": f"UPDATE {TABLE} SET v_vector = {{}} WHERE user_id LIKE '%%1'",
    "wholly": f"UPDATE {TABLE} SET v_vector = {{}}",
    "stale": f"UPDATE {TABLE} SET v_vector = '[9,9,9,9,9,9,9,9]'",
}


# scripts by hand -> indexes; an index needs a column with a dimension, so the first script alone makes none
SCRIPTS = {
    "no dimension": [EXPAND_SQL],
    "dimension, no index": [EXPAND_SQL, FINALIZE_SQL, f"DROP INDEX {SECOND_INDEX}"],
    "second index": [EXPAND_SQL, FINALIZE_SQL],
    "both indexes": [EXPAND_SQL, FINALIZE_SQL, EXPAND_SQL],
    "first index": [EXPAND_SQL, FINALIZE_SQL, EXPAND_SQL, f"DROP INDEX {SECOND_INDEX}"],
}


def by_hand(database: Database, scripts: list[str], fill: str = "wholly", rows: list[Row] = ROWS) -> None:
    """Create the table as OpenMemory does, apply the scripts, and fill v_vector as the old tool did."""
    create_table(database)
    load(database, rows)
    for script in scripts:
        database.run(script)
    # the old tool's text literals, with the few digits that they have
    text = "(SELECT ('[' || string_agg(round(i / 3, 3)::text, ',') || ']')::vector FROM generate_series(1.0, 8) i)"
    database.run(FILL[fill].format(text).replace("%%", "%"))


def with_sourceless(database: Database, scripts: list[str], vectors: list[str]) -> None:
    by_hand(database, scripts, "half")
    for vector in vectors:
        database.run(f"INSERT INTO {TABLE} (id, sector, dim, v_vector) VALUES (gen_random_uuid(), 'own', 8, {vector})")
