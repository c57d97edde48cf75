"""A statement before configure(), so that Alembic takes the transaction for env.py's, and no commit."""

from logging.config import fileConfig

from alembic import context
from models import metadata
from sqlalchemy import engine_from_config, text

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name)

section = context.config.get_section("alembic", {})
with engine_from_config(section).connect() as connection:
    connection.execute(text("SET lock_timeout = '5s'"))
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()
