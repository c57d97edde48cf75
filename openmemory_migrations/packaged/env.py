"""The env.py of the console script, for who has no alembic.ini: the same as that of a checkout."""

from openmemory_migrations.environment import run

run()
