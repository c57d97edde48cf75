"""Neither a transaction of its own nor context.begin_transaction(): nothing of it is kept, refused."""

from logging.config import fileConfig

from alembic import context
from models import metadata
from sqlalchemy import engine_from_config

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name)

section = context.config.get_section("alembic", {})
with engine_from_config(section).connect() as connection:
    context.configure(connection=connection, target_metadata=metadata)
    context.run_migrations()
