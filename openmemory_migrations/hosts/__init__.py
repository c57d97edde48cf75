"""A host application's Alembic project."""
