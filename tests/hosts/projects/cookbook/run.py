"""`run.py upgrade head`: Alembic's commands on a connection of the application's, which commits."""

import sys
from collections.abc import Callable

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

name, revision = sys.argv[1:]
run: Callable[[Config, str], None] = getattr(command, name)
config = Config("alembic.ini")
with create_engine(config.get_main_option("sqlalchemy.url", "")).begin() as connection:
    config.attributes["connection"] = connection
    run(config, revision)
