"""A step inside Alembic's context."""
