"""SET LOCAL of role and search_path before configure(), and a commit at the end, under an async engine."""

import asyncio
from logging.config import fileConfig

from alembic import context
from models import metadata
from sqlalchemy import pool, text
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import async_engine_from_config
from unchanged import unchanged

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name)

section = context.config.get_section("alembic", {})


def migrate(connection: Connection) -> None:
    connection.execute(text("SET LOCAL search_path = app"))
    connection.execute(text("SET LOCAL role = host_owner"))
    context.configure(connection=connection, target_metadata=metadata)
    with unchanged(connection):
        context.run_migrations()
    connection.commit()


async def main() -> None:
    engine = async_engine_from_config(section, poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


asyncio.run(main())
