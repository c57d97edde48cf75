"""A host project in a folder of its own: `base`, and over it what an environment style has differently."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from demo.openmemory import environment
from tests.support import forkserver
from tests.support.commands import NOTHING, ROOT, Result, result
from tests.support.openmemory import Database

HOSTS = ROOT / "tests/hosts/projects"
PLACE = "driver://user:pass@localhost/dbname"  # what `alembic init` leaves to be filled in
STUBS = ("om_20240107_pgvector", "om_20240107_backfill", "om_20240108_finalize")


@dataclass(frozen=True)
class Host:
    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def env(self) -> Path:
        return self.folder / "migrations" / "env.py"

    def use(self, style: str) -> None:
        """Puts the style's files over what is there, but for the configuration."""
        shutil.copytree(
            HOSTS / style, self.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.ini", "*.toml")
        )

    def alembic(self, *args: str, check: bool = True, env: Mapping[str, str] = NOTHING) -> Result:
        """Runs the real alembic command here, or the host's own run.py."""
        program = ["run.py"] if (self.folder / "run.py").exists() else ["-m", "alembic"]
        return self.python(*program, *args, check=check, env=env)

    def python(self, *args: str, check: bool = True, env: Mapping[str, str] = NOTHING) -> Result:
        env = environment(None, {**self.settings, **env})
        done = result(forkserver.start(args, cwd=self.folder, env=env))
        assert not check or done.returncode == 0, f"{' '.join(args)}: {done.returncode}\n{done.log}"
        return done


def create(
    folder: Path,
    style: str,
    database: Database,
    driver: str = "psycopg2",
    second: Database | None = None,
    settings: Mapping[str, str] = NOTHING,
) -> Host:
    """The project, connected to `database`; `second` is multidb's other one."""
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("base", style):
        shutil.copytree(HOSTS / part, folder, dirs_exist_ok=True, ignore=ignore)
    ini = folder / "alembic.ini"
    text = ini.read_text()
    if second:
        text = text.replace(PLACE + "2", _url(second, driver))
    ini.write_text(text.replace(PLACE, _url(database, driver)))
    return Host(folder, settings)


def _url(database: Database, driver: str) -> str:
    return database.url.replace("postgresql:", f"postgresql+{driver}:").replace("%", "%%")
