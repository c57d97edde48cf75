"""Alembic's script_location for the console script."""
