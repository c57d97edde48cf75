"""Each command once as a Python started from nothing, by its console script: elsewhere they are forked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from demo.openmemory import environment
from openmemory_migrations.cli import COMMANDS
from tests.support.cases import exhaustive
from tests.support.commands import ROOT
from tests.support.databases import Databases
from tests.support.host_init import init
from tests.support.openmemory import Database
from tests.support.verification import migrated

ARGUMENTS = {
    "cutover": ["current"],
    "downgrade": ["om_20240107_backfill"],
    "report": ["--output", "report.html"],
    "sql": ["-x", "vec_dim=16"],
    "stubs": ["--dimensions", "16"],
    "tune": ["--sample", "500"],
}


def run(program: str, *arguments: str, database: Database, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        cwd=cwd,
        env=environment(database, {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [command if i % 2 else exhaustive(command) for i, command in enumerate(sorted(COMMANDS))]
)
def test_each_command_by_its_console_script(databases: Databases, tmp_path: Path, command: str) -> None:
    with databases.copy(migrated) as database:
        folder = init(tmp_path, database).folder
        arguments = ARGUMENTS.get(command, [])
        # the host has no stubs yet, which doctor says
        wanted = 1 if command == "doctor" else 0

        done = run("openmemory-migrations", command, *arguments, database=database, cwd=folder)

        assert done.returncode == wanted, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["upgrade head", "downgrade -1", "current", "upgrade head --sql -x vec_dim=16"])
def test_alembic_by_its_console_script(databases: Databases, arguments: str) -> None:
    command, _, setting = arguments.partition(" -x ")
    with databases.copy(migrated) as database:
        before = ["-x", setting] if setting else []
        done = run("alembic", *before, *command.split(), database=database, cwd=ROOT)

        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
