"""`run.py upgrade head`: Alembic's commands on an async connection of the application's, which commits."""

import asyncio
import sys

from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import create_async_engine

name, revision = sys.argv[1:]
config = Config("alembic.ini")


def run(connection: Connection) -> None:
    config.attributes["connection"] = connection
    getattr(command, name)(config, revision)


async def main() -> None:
    engine = create_async_engine(config.get_main_option("sqlalchemy.url", ""))
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


asyncio.run(main())
