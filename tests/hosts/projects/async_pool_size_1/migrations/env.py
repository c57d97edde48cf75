"""An async pool of one connection and no more."""

import asyncio
from logging.config import fileConfig

from alembic import context
from models import metadata
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import async_engine_from_config
from unchanged import unchanged

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name)

section = context.config.get_section("alembic", {})


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction(), unchanged(connection):
        context.run_migrations()


async def main() -> None:
    engine = async_engine_from_config(section, pool_size=1, max_overflow=0)
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


asyncio.run(main())
