"""Inside a SAVEPOINT: refused."""

from logging.config import fileConfig

from alembic import context
from models import metadata
from sqlalchemy import engine_from_config

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name)

section = context.config.get_section("alembic", {})
with engine_from_config(section).begin() as connection, connection.begin_nested():
    context.configure(connection=connection, target_metadata=metadata)
    context.run_migrations()
