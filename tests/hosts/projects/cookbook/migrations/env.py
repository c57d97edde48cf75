"""Alembic's cookbook: run.py passes its connection in config.attributes."""

from logging.config import fileConfig

from alembic import context
from models import metadata
from unchanged import unchanged

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name)


connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction(), unchanged(connection):
    context.run_migrations()
