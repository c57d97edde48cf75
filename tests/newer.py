"""OpenMemory since January 2026, as the database sees it: its table, its start, and its statements."""

from __future__ import annotations

from typing import Any

from demo.openmemory import TABLE

from .helpers import Database

NEWER_INDEX = "openmemory_vectors_hnsw_idx"
CREATE = (
    f"CREATE TABLE IF NOT EXISTS {TABLE} (id uuid, sector text, user_id text, project_id text, v vector,"
    " dim integer NOT NULL, PRIMARY KEY (id, sector))"
)
START = (
    f"CREATE EXTENSION IF NOT EXISTS vector; {CREATE};"
    f" CREATE INDEX IF NOT EXISTS {NEWER_INDEX} ON {TABLE} USING hnsw (v vector_cosine_ops)"
)
MIGRATION_1_3_0 = f"ALTER TABLE {TABLE} ADD COLUMN IF NOT EXISTS project_id text"
UPSERT = f"""
INSERT INTO {TABLE} (id, sector, user_id, project_id, v, dim) VALUES (%s, %s, %s, %s, %s::vector, %s)
ON CONFLICT (id, sector) DO UPDATE SET user_id = excluded.user_id, project_id = excluded.project_id, v = excluded.v,
  dim = excluded.dim
"""
READ = f"SELECT v::text FROM {TABLE} WHERE id = %s AND sector = %s"
SEARCH = f"""
SELECT id, 1 - (v <=> %s::vector) AS score FROM {TABLE} WHERE sector = %s ORDER BY v <=> %s::vector LIMIT %s
"""


def search(database: Database, query: str, sector: str, rows: int = 10) -> list[tuple[Any, ...]]:
    return database.rows(SEARCH, query, sector, query, rows)
