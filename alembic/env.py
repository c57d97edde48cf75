from openmemory_migrations.environment import run

run()
