"""The steps inside a host application's own Alembic chain, for every way to write an env.py, on every driver.

The hosts are in tests/hosts/projects. Each has the steps as stubs behind two revisions of its own, and its env.py
asserts that a migration gives the connection back as it was. What passes is the table in docs/hosts.md:
OM_WRITE_DOCS=1 writes it.
"""

from __future__ import annotations

import ast
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alembic
import pytest
from psycopg2.sql import SQL, Identifier

from tests.support.commands import ROOT
from tests.support.databases import Databases
from tests.support.host_styles import HOSTS, STUBS, Host, create
from tests.support.openmemory import Database, checksum, load, mismatches, random_rows

DIMENSIONS = 64
ROWS = 5000
BATCH = 1000
SETTINGS = {"OM_VEC_DIM": str(DIMENSIONS), "BACKFILL_BATCH": str(BATCH)}
INDEX = "openmemory_vectors_vvector_idx"
VERSION = tuple(map(int, alembic.__version__.split(".")[:2]))

SYNC = (
    "generic",
    "pyproject",
    "multidb",
    "transaction_per_migration",
    "engine_begin",
    "connection_begin",
    "cookbook",
    "autocommit",
    "serializable",
    "pool_size_1",
    "set_local",
)
ASYNC = (
    "async",
    "pyproject_async",
    "async_transaction_per_migration",
    "async_engine_begin",
    "async_cookbook",
    "async_autocommit",
    "async_serializable",
    "async_pool_size_1",
    "async_set_local",
)
DRIVERS = dict.fromkeys(SYNC, ("psycopg2", "psycopg")) | dict.fromkeys(ASYNC, ("asyncpg", "psycopg_async"))
COMBINATIONS = [(style, driver) for style, drivers in DRIVERS.items() for driver in drivers]
# one of each driver, who owns the transaction, and what a commit loses; of the others CI has one driver
QUICK = {
    ("generic", "psycopg2"),
    ("engine_begin", "psycopg"),
    ("set_local", "psycopg2"),
    ("async", "asyncpg"),
}
# the second batch of a run meets it: the first one's rows are filled; a batch has several statements
TROUBLE = """
CREATE FUNCTION {schema}.trouble() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (SELECT count(*) FROM {schema}.openmemory_vectors WHERE v_vector IS NOT NULL) BETWEEN 1000 AND 4000 THEN
    SET TRANSACTION ISOLATION LEVEL SERIALIZABLE;  -- which the server refuses, whatever the rows are
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER trouble BEFORE UPDATE ON {schema}.openmemory_vectors
  FOR EACH STATEMENT EXECUTE FUNCTION {schema}.trouble();
"""
COLUMNS = ["id", "sector", "user_id", "v", "dim"]


@dataclass(frozen=True)
class Place:
    """The host's database, asked from outside."""

    database: Database
    schema: str

    def value(self, sql: str, *args: Any) -> Any:
        return self.database.value(SQL(sql).format(schema=Identifier(self.schema)), *args)

    @property
    def stamp(self) -> list[str]:
        rows = self.database.rows(SQL("SELECT version_num FROM {}").format(Identifier(self.schema, "alembic_version")))
        return sorted(version for (version,) in rows)

    @property
    def columns(self) -> list[str]:
        return list(
            self.value(
                "SELECT array_agg(attname::text ORDER BY attnum) FROM pg_attribute"
                " WHERE attrelid = '{schema}.openmemory_vectors'::regclass AND attnum > 0 AND NOT attisdropped"
            )
        )

    @property
    def batches(self) -> list[tuple[str, int]]:
        """The transactions that filled rows, and how many rows each."""
        return self.database.rows(
            SQL("SELECT xmin::text, count(*) FROM {} WHERE v_vector IS NOT NULL GROUP BY 1").format(
                Identifier(self.schema, "openmemory_vectors")
            )
        )

    def assert_migrated(self) -> None:
        """Every row to the bit, in batches that were committed one by one, with a valid index, and stamped."""
        assert mismatches(self.database, schema=self.schema, dim=DIMENSIONS) == []
        assert sum(rows for _, rows in self.batches) == ROWS
        assert len(self.batches) >= ROWS // BATCH, self.batches
        assert max(rows for _, rows in self.batches) <= BATCH, self.batches
        valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = %s::regclass"
        assert self.database.value(valid, f"{self.schema}.{INDEX}") is True
        assert self.stamp == [STUBS[-1]]

    def assert_host_only(self) -> None:
        """The tables of the host as its own two revisions have left them."""
        assert self.columns == COLUMNS
        assert self.value("SELECT to_regclass('{schema}.notes') IS NOT NULL")
        assert self.stamp == ["host_2"]

    def load(self) -> str:
        load(self.database, random_rows(ROWS, DIMENSIONS), schema=self.schema)
        return checksum(self.database, schema=self.schema)


@pytest.fixture
def second(databases: Databases) -> Iterator[Database]:
    """The other database of a multidb host; it has no table of OpenMemory's."""
    with databases.empty() as database:
        yield database


def prepared(database: Database, style: str) -> Place:
    """What an administrator has to do before the host's first revision."""
    if not style.endswith("set_local"):
        return Place(database, "public")
    if not database.value("SELECT count(*) FROM pg_roles WHERE rolname = 'host_owner'"):
        database.run("CREATE ROLE host_owner")
    database.run("CREATE SCHEMA app AUTHORIZATION host_owner")
    database.run("CREATE EXTENSION vector")
    return Place(database, "app")


# each style with one driver, and two styles with every driver
IN_CI = {(style, drivers[0]) for style, drivers in DRIVERS.items()} | {
    *(("pyproject", "psycopg"), ("async_engine_begin", "psycopg_async"), ("async_serializable", "asyncpg")),
    *(("generic", driver) for driver in DRIVERS["generic"]),
    *(("async", driver) for driver in DRIVERS["async"]),
}


def marked(style: str, driver: str) -> Any:
    marks = [] if (style, driver) in QUICK else [pytest.mark.slow]
    if (style, driver) not in QUICK | IN_CI:
        marks.append(pytest.mark.exhaustive)
    return pytest.param(style, driver, marks=marks, id=f"{style}-{driver}")


@pytest.mark.parametrize(("style", "driver"), [marked(*both) for both in COMBINATIONS])
def test_a_host_upgrades_fails_continues_downgrades_and_upgrades_again(
    style: str, driver: str, database: Database, second: Database, tmp_path: Path
) -> None:
    if style.startswith("pyproject") and VERSION < (1, 16):
        pytest.skip("Alembic reads pyproject.toml from 1.16 on")
    write_docs(style, driver, passed=False)
    place = prepared(database, style)
    settings = SETTINGS | ({} if place.schema == "public" else {"OM_PG_SCHEMA": place.schema})
    host = create(tmp_path / "host", style, database, driver, second, settings)

    log = host.alembic("upgrade", "head").log  # from nothing
    assert place.stamp == [STUBS[-1]]
    assert place.columns == [*COLUMNS, "v_vector"]
    host.alembic("downgrade", "host_2")
    place.assert_host_only()

    before = place.load()
    database.run(SQL(TROUBLE).format(schema=Identifier(place.schema)))
    failed = host.alembic("upgrade", "head", check=False)
    assert failed.returncode != 0
    assert "must be called before any query" in failed.stderr
    assert place.stamp == [STUBS[0]]
    committed = place.batches
    assert 0 < sum(rows for _, rows in committed) < ROWS

    database.run(SQL("DROP FUNCTION {schema}.trouble CASCADE").format(schema=Identifier(place.schema)))
    log += host.alembic("upgrade", "head").log
    assert set(committed) < set(place.batches), "the rows that had been converted were written again"
    place.assert_migrated()

    host.alembic("downgrade", "host_2")
    place.assert_host_only()
    assert checksum(database, schema=place.schema) == before

    log += host.alembic("upgrade", "head").log  # with 5,000 rows in place
    place.assert_migrated()
    assert checksum(database, schema=place.schema) == before
    if not style.endswith("set_local"):  # where nobody can tell beforehand whether env.py commits
        assert "WARNING" not in log
    write_docs(style, driver, passed=True)


@pytest.mark.parametrize(
    ("style", "driver", "named"),
    [
        ("savepoint", "psycopg2", "begin_nested"),
        ("savepoint", "psycopg", "begin_nested"),
        ("async_savepoint", "asyncpg", "begin_nested"),
        ("async_savepoint", "psycopg_async", "begin_nested"),
        ("two_phase", "psycopg2", "begin_twophase"),
        ("two_phase", "psycopg", "begin_twophase"),
        ("never_commits", "psycopg2", "context.begin_transaction()"),
        ("never_commits", "psycopg", "context.begin_transaction()"),
    ],
)
def test_an_env_that_cannot_keep_a_batch_or_the_stamp_is_refused_before_anything_is_done(
    style: str, driver: str, named: str, database: Database, tmp_path: Path
) -> None:
    host = host_with_rows(tmp_path / "host", database, style, driver)
    refused = host.alembic("upgrade", "head", check=False)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert "FAILED: " in refused.log
    assert named in refused.log
    assert "env.py" in refused.log
    Place(database, "public").assert_host_only()
    assert database.value("SELECT count(*) FROM pg_extension WHERE extname = 'vector'") == 0


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_an_env_that_may_never_commit_is_warned_about(driver: str, database: Database, tmp_path: Path) -> None:
    host = host_with_rows(tmp_path / "host", database, "set_never_commits", driver)
    log = host.alembic("upgrade", "head").log
    (warning,) = [line for line in log.splitlines() if "WARNING" in line]
    assert "stamp" in warning
    assert "env.py" in warning
    assert "commit" in warning


def test_a_driver_that_is_not_supported_is_refused_by_name(database: Database, tmp_path: Path) -> None:
    pytest.importorskip("pg8000", reason="pg8000, the driver to be refused, is not installed")
    host = host_with_rows(tmp_path / "host", database, "generic", "psycopg2")
    ini = host.folder / "alembic.ini"
    socket = re.findall("host=(.*)", database.url)[0]
    url = f"postgresql+pg8000://postgres@/{database.name}?unix_sock={socket}/.s.PGSQL.5432"
    ini.write_text(re.sub("(?m)^sqlalchemy.url = .*", f"sqlalchemy.url = {url}", ini.read_text()))
    refused = host.alembic("upgrade", "head", check=False)
    assert refused.returncode != 0
    assert 'driver "pg8000" is not supported' in refused.log
    Place(database, "public").assert_host_only()


def host_with_rows(folder: Path, database: Database, style: str, driver: str) -> Host:
    """A host that was fine until its env.py became one that won't do: at its own head, with rows."""
    host = create(folder, "async" if style.startswith("async") else "generic", database, driver, settings=SETTINGS)
    host.alembic("upgrade", "host_2")
    Place(database, "public").load()
    host.use(style)
    return host


# -- our revisions as a branch of their own, through version_locations


@pytest.fixture
def branch(database: Database, tmp_path: Path) -> Host:
    """A host without stubs, whose ini names our folder beside its own."""
    host = create(tmp_path / "host", "generic", database, settings=SETTINGS)
    for stub in (host.folder / "migrations/versions").glob("om_*.py"):
        stub.unlink()
    return host


LOCATIONS = "version_locations = %(here)s/migrations/versions openmemory_migrations:versions"


def locate(host: Host, *lines: str) -> None:
    ini = host.folder / "alembic.ini"
    text = ini.read_text()
    assert "path_separator = os" in text
    ini.write_text(text.replace("path_separator = os", "\n".join(lines)))


def test_version_locations_run_beside_the_hosts_own_chain(branch: Host, database: Database) -> None:
    locate(branch, LOCATIONS, "path_separator = space", "version_path_separator = space")
    place = Place(database, "public")
    assert "Deprecat" not in branch.alembic("heads").log
    ambiguous = branch.alembic("upgrade", "head", check=False)
    assert ambiguous.returncode != 0
    assert "Multiple head revisions" in ambiguous.log

    branch.alembic("upgrade", "host_2")  # its table has to be there first
    before = place.load()
    branch.alembic("upgrade", "heads")
    assert place.stamp == ["host_2", STUBS[-1]]
    assert mismatches(database, dim=DIMENSIONS) == []
    branch.alembic("downgrade", f"{STUBS[0]}@base")
    place.assert_host_only()
    branch.alembic("upgrade", STUBS[-1])
    assert mismatches(database, dim=DIMENSIONS) == []
    assert len(place.batches) > 1
    assert checksum(database) == before


def test_version_locations_on_a_fresh_database_may_come_before_the_hosts_table(
    branch: Host, database: Database
) -> None:
    locate(branch, LOCATIONS, "path_separator = space", "version_path_separator = space")
    failed = branch.alembic("upgrade", "heads", check=False)
    assert failed.returncode != 0
    assert 'table "public.openmemory_vectors" does not exist' in failed.log


def test_version_locations_with_the_separator_of_alembic_init_are_silently_dropped(branch: Host) -> None:
    locate(
        branch,
        LOCATIONS.replace("versions openmemory", "versions:openmemory"),
        "path_separator = os",
        "version_path_separator = os",
    )
    assert STUBS[-1] not in branch.alembic("heads").log


# -- what the page says


MARKS = (
    "<!-- combinations: written by OM_WRITE_DOCS=1 python -m pytest tests/hosts/test_env_styles.py -m '' -->\n",
    "<!-- end -->",
)
PAGE = ROOT / "docs" / "hosts.md"
ALL_DRIVERS = ("psycopg2", "psycopg", "asyncpg", "psycopg_async")


def write_docs(style: str, driver: str, *, passed: bool) -> None:
    """Says in docs/hosts.md whether this combination passes, if OM_WRITE_DOCS asks for it."""
    if not os.environ.get("OM_WRITE_DOCS"):
        return
    with PAGE.open("r+") as page:
        fcntl.flock(page, fcntl.LOCK_EX)  # the tests run in several processes
        text = page.read()
        passing = (documented(text) & set(COMBINATIONS)) - {(style, driver)} | ({(style, driver)} if passed else set())
        start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
        page.seek(0)
        page.write(text[:start] + table(passing) + text[end:])
        page.truncate()


def table(passing: set[tuple[str, str]]) -> str:
    lines = ["| env.py | what it does | " + " | ".join(ALL_DRIVERS) + " |", "|---" * (2 + len(ALL_DRIVERS)) + "|"]
    for style, drivers in DRIVERS.items():
        path = f"tests/hosts/projects/{style}/migrations/env.py"
        cells = [("yes" if (style, d) in passing else "no") if d in drivers else "-" for d in ALL_DRIVERS]
        what = (ast.get_docstring(ast.parse((ROOT / path).read_text())) or "").rstrip(".")
        lines.append(f"| [{style}](../{path}) | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def documented(text: str) -> set[tuple[str, str]]:
    """The combinations that the page says yes to."""
    between = text[text.index(MARKS[0]) : text.index(MARKS[1])]
    rows = re.findall(r"(?m)^\| \[(\w+)\]\(.*?\) \| .* \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", between)
    return {
        (style, driver)
        for style, *cells in rows
        for driver, cell in zip(ALL_DRIVERS, cells, strict=True)
        if cell == "yes"
    }


def test_the_page_lists_exactly_the_combinations_that_pass() -> None:
    text = PAGE.read_text()
    assert documented(text) == set(COMBINATIONS)
    assert table(set(COMBINATIONS)) in text


def test_every_host_project_is_tested() -> None:
    there = {path.parent.parent.name for path in HOSTS.glob("*/migrations/env.py")}
    refused = {"savepoint", "async_savepoint", "two_phase", "never_commits", "set_never_commits"}
    assert there == set(DRIVERS) | refused


@pytest.mark.parametrize(("style", "options"), [("base", []), ("multidb", ["--engine-name", "engine1"])])
def test_the_hosts_have_the_stubs_that_the_command_writes(style: str, options: list[str], tmp_path: Path) -> None:
    host = Host(tmp_path / "host")
    for part in ("base", style):
        shutil.copytree(HOSTS / part, host.folder, dirs_exist_ok=True)
    folder = host.folder / "migrations/versions"
    for stub in folder.glob("om_*.py"):
        stub.unlink()
    command = ["-m", "openmemory_migrations", "stubs", "--directory", "migrations/versions"]
    host.python(*command, "--down-revision", "host_2", *options)
    written = {path.name: path.read_text() for path in folder.glob("om_*.py")}
    assert written == {path.name: path.read_text() for path in (HOSTS / style / "migrations/versions").glob("om_*.py")}


@pytest.mark.parametrize("template", ["generic", "async", "multidb", "pyproject", "pyproject_async"])
def test_the_hosts_from_templates_are_what_alembic_init_makes(template: str) -> None:
    """But for comments, the host's metadata and the check around run_migrations()."""
    original = Path(alembic.__file__).parent / "templates" / template / "env.py"
    if not original.exists():
        pytest.skip(f"Alembic {alembic.__version__} has no template {template}")
    edited = {"target_metadata = None", "target_metadata = {}", "with context.begin_transaction():"}
    kept = statements(HOSTS / template / "migrations" / "env.py")
    assert [line for line in statements(original) if line not in kept and line not in edited] == []


def statements(path: Path) -> list[str]:
    """The lines of its code, however it is formatted, without docstrings, imports and annotations."""
    code = ast.unparse(ast.parse(path.read_text()))
    code = re.sub(r'(?s)""".*?"""', "", code)
    code = code.replace(": dict[str, dict[str, Any]]", "").replace("dict[str, Any]()", "{}")
    return [line.strip() for line in code.splitlines() if line.strip() and " import " not in line]
