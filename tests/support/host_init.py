"""A host application made by the real `alembic init`, with two revisions of its own; the first creates the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.openmemory import environment
from openmemory_migrations.hosts.project import SEPARATOR
from tests.support import forkserver
from tests.support.commands import NOTHING, Result, result
from tests.support.openmemory import Database

ASYNC = ("async", "pyproject_async")
HISTORY = {
    "h1": '''"""create the table"""
from alembic import op
revision = "h1"
down_revision = None
def upgrade(**kw):
    op.execute(
        "CREATE TABLE openmemory_vectors (id uuid, sector text, user_id text, v bytea,"
        " dim integer NOT NULL, PRIMARY KEY (id, sector))"
    )
def downgrade(**kw):
    op.execute("DROP TABLE openmemory_vectors")
''',
    "h2": '''"""create notes"""
from alembic import op
revision = "h2"
down_revision = "h1"
def upgrade(**kw):
    op.execute("CREATE TABLE notes (id integer PRIMARY KEY)")
def downgrade(**kw):
    op.execute("DROP TABLE notes")
''',
}


@dataclass(frozen=True)
class Host:
    folder: Path

    @property
    def ini(self) -> Path:
        return self.folder / "alembic.ini"

    @property
    def toml(self) -> Path:
        return self.folder / "pyproject.toml"

    @property
    def env(self) -> Path:
        return self.folder / "migrations/env.py"

    @property
    def versions(self) -> Path:
        return self.folder / "migrations/versions"

    def add(self, name: str, text: str) -> Path:
        path = self.versions / f"{name}.py"
        path.write_text(text)
        return path

    def alembic(self, *args: str, check: bool = True, env: Mapping[str, str] = NOTHING) -> Result:
        return self._run("alembic", *args, check=check, env=env)

    def ours(self, *args: str, check: bool = False, env: Mapping[str, str] = NOTHING) -> Result:
        """openmemory-migrations in this folder."""
        return self._run("openmemory_migrations", *args, check=check, env=env)

    def _run(self, program: str, *args: str, check: bool, env: Mapping[str, str]) -> Result:
        env = environment(None, {"PYTHONDONTWRITEBYTECODE": "1", **env})
        done = result(forkserver.start(["-m", program, *args], cwd=self.folder, env=env))
        assert not check or done.returncode == 0, f"{program} {' '.join(args)}: {done.returncode}\n{done.log}"
        return done


def init(
    folder: Path,
    database: Database | None,
    template: str = "generic",
    driver: str | None = None,
    history: Mapping[str, str] = HISTORY,
) -> Host:
    """A new host in `folder`, whose env.py is the template's, to the letter."""
    host = Host(folder)
    host.alembic("init", "-t", template, "migrations")
    driver = driver or ("asyncpg" if template in ASYNC else "psycopg2")
    if database:
        set_url(host, url(database, driver))
    for name, text in history.items():
        host.add(name, text)
    return host


def url(database: Database, driver: str) -> str:
    """The URL for that driver, as it's written in an ini file."""
    return database.url.replace("postgresql:", f"postgresql+{driver}:").replace("%", "%%")


def set_url(host: Host, *urls: str) -> None:
    """One URL for each `sqlalchemy.url` in turn; the last for those that are left."""
    lines, left = [], list(urls)
    for line in host.ini.read_text().splitlines():
        if line.startswith("sqlalchemy.url"):
            line = f"sqlalchemy.url = {left[0]}"
            left = left[1:] or left
        lines.append(line)
    host.ini.write_text("\n".join(lines) + "\n")


def configure(host: Host, **options: str) -> None:
    """Sets options in the ini file's [alembic]; `separator` is that of this Alembic's version_locations."""
    if "separator" in options:
        options[SEPARATOR] = options.pop("separator")
    lines = [line for line in host.ini.read_text().splitlines() if line.partition(" =")[0] not in options]
    where = lines.index("[alembic]") + 1
    lines[where:where] = [f"{name} = {value}" for name, value in options.items()]
    host.ini.write_text("\n".join(lines) + "\n")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new))
