"""The real commands, `alembic` and `openmemory-migrations`, each a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from demo.openmemory import Database, environment
from tests.support import forkserver
from tests.support.engines import CHOSEN
from tests.support.forkserver import ROOT, Process

__all__ = ["NOTHING", "ROOT", "Process", "Result", "alembic", "om", "result", "start_alembic", "start_om"]

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str

    @property
    def log(self) -> str:
        return self.stdout + self.stderr


def alembic(
    database: Database | None,
    *args: str,
    env: Mapping[str, str] = NOTHING,
    check: bool = True,
    timeout: float = 120,
) -> Result:
    """Run the real alembic command in the repo's root; its settings are OM_DATABASE_URL and `env`."""
    done = result(start_alembic(database, *args, env=env), timeout)
    assert not check or done.returncode == 0, f"alembic {' '.join(args)}: {done.returncode}\n{done.log}"
    return done


def start_alembic(
    database: Database | None, *args: str, env: Mapping[str, str] = NOTHING, patch: str | None = None
) -> Process:
    """Start the same without waiting, for a test that does something meanwhile, or kills it.

    `patch` is Python that changes a constant of the package's modules first.
    """
    program = ["-m", "alembic"]
    if patch is not None:
        program = ["-c", f"{_patched(patch)}\nfrom alembic.config import main\nmain()"]
    return forkserver.start([*program, *args], cwd=ROOT, env=environment(database, CHOSEN | dict(env)))


def om(database: Database | None, *args: str, env: Mapping[str, str] = NOTHING) -> Result:
    """Run the console script in a folder that isn't a project of Alembic's."""
    return result(start_om(database, *args, env=env))


def start_om(
    database: Database | None, *args: str, env: Mapping[str, str] = NOTHING, patch: str | None = None
) -> Process:
    program = ["-m", "openmemory_migrations"]
    if patch is not None:
        program = ["-c", f"{_patched(patch)}\nimport sys\nfrom openmemory_migrations.cli import main\nsys.exit(main())"]
    return forkserver.start([*program, *args], cwd=tempfile.gettempdir(), env=environment(database, CHOSEN | dict(env)))


PATCHED = (
    "from openmemory_migrations.backfill import pace",
    "from openmemory_migrations.db import connections, database, locks, tries",
    "from openmemory_migrations.index import build_progress",
)


def _patched(patch: str) -> str:
    return "\n".join([*PATCHED, patch])


def result(process: Process, timeout: float = 120) -> Result:
    """What a process has said and its exit code, once it has ended."""
    stdout, stderr = process.communicate(timeout)
    assert process.returncode is not None
    return Result(process.returncode, stdout, stderr)
