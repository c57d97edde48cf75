"""connection.begin(): env.py owns the transaction and commits at the end."""

from logging.config import fileConfig

from alembic import context
from models import metadata
from sqlalchemy import engine_from_config, pool
from unchanged import unchanged

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name)

section = context.config.get_section("alembic", {})
with engine_from_config(section, poolclass=pool.NullPool).connect() as connection, connection.begin():
    context.configure(connection=connection, target_metadata=metadata)
    with unchanged(connection):
        context.run_migrations()
