"""Alembic revisions that move OpenMemory's Postgres vectors from bytea to pgvector, online and back."""

__version__ = "0.1.0"
