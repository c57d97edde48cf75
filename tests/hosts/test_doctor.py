"""openmemory-migrations doctor: each finding provoked in a real host on a real server, and mended by its own advice."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openmemory_migrations.hosts import env_py, probe
from openmemory_migrations.hosts.probe import Seen
from openmemory_migrations.hosts.project import KNOWS_TOML, LOCATION, REVISIONS, SEPARATOR
from tests.support.commands import ROOT, Result
from tests.support.host_init import HISTORY, Host, configure, init, replace, set_url, url
from tests.support.openmemory import Database, load, mismatches, random_rows

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

EXPAND, BACKFILL, FINALIZE = REVISIONS
BEGIN = """        with context.begin_transaction():
            context.run_migrations()
"""
CONFIGURE = "        context.configure(\n"


toml = pytest.mark.skipif(not KNOWS_TOML, reason="pyproject.toml is new in Alembic 1.16")


@pytest.fixture
def host(tmp_path: Path, database: Database) -> Host:
    """Healthy: the generic template, with stubs."""
    host = init(tmp_path, database)
    host.ours("stubs", check=True)
    return host


@pytest.fixture
def bare(tmp_path: Path, database: Database) -> Host:
    """The generic template and nothing of ours."""
    return init(tmp_path, database)


def findings(host: Host, code: int, *args: str, **env: str) -> dict[str, dict[str, str]]:
    done = host.ours("doctor", "--json", *args, env=env)
    assert done.returncode == code, done.log
    return {one["code"]: one for one in json.loads(done.stdout)["findings"]}


def python(text: str) -> str:
    """A hint of Python lines, indented as in the template's env.py."""
    return "".join(f"        {line}\n" for line in text.splitlines())


def paste(host: Host, hint: str) -> None:
    """Puts the lines of a hint into the ini file, in place of the keys that are there."""
    first, *lines = hint.splitlines()
    assert first == "In [alembic]:"
    keys = [line.partition(" =")[0] for line in lines if not line.startswith(" ")]
    kept = [line for line in host.ini.read_text().splitlines() if line.partition(" =")[0] not in keys]
    where = kept.index("[alembic]") + 1
    host.ini.write_text("\n".join([*kept[:where], *lines, *kept[where:]]) + "\n")


# -- nothing wrong


@pytest.mark.parametrize(
    ("template", "driver"),
    [
        ("generic", "psycopg2"),
        ("generic", "psycopg"),
        ("async", "asyncpg"),
        ("async", "psycopg"),
        pytest.param("pyproject", "psycopg2", marks=toml),
        pytest.param("pyproject_async", "asyncpg", marks=toml),
    ],
)
def test_template_with_stubs_is_healthy(template: str, driver: str, tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database, template, driver)
    host.ours("stubs", check=True)

    healthy = host.ours("doctor")

    assert (healthy.returncode, healthy.stdout, healthy.stderr) == (0, "", "NOTICE:  nothing is wrong\n")
    host.alembic("upgrade", "head")
    assert findings(host, 0) == {}


@pytest.mark.slow
def test_quiet_says_nothing_of_what_is_right(tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database, "generic", "psycopg2")

    assert host.ours("stubs", "--quiet", check=True).stderr == ""
    assert host.ours("doctor", "--quiet", check=True).log == ""


def test_this_repository_is_healthy(database: Database) -> None:
    assert findings(Host(ROOT), 0, OM_DATABASE_URL=database.url) == {}


def test_nothing_is_changed(host: Host, database: Database) -> None:
    before = sorted(host.folder.rglob("*"))

    findings(host, 0)

    assert sorted(host.folder.rglob("*")) == before
    assert not database.rows("SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace")


def test_text_is_in_postgresqls_manner(bare: Host) -> None:
    done = bare.ours("doctor")

    assert done.returncode == 1
    assert re.fullmatch(r"ERROR:  .*\nDETAIL:  .*\nHINT:  .*\n", done.stdout)
    assert done.stderr == ""


# -- configuration


def test_no_configuration(tmp_path: Path) -> None:
    done = Host(tmp_path).ours("doctor")

    assert done.returncode == 2
    assert "--config" in done.stderr


@pytest.mark.parametrize("folder", ["host", "my host"])
def test_separator_of_the_template_hides_our_location(folder: str, tmp_path: Path, database: Database) -> None:
    (tmp_path / folder).mkdir()
    host = init(tmp_path / folder, database)
    configure(host, version_locations=f"%(here)s/migrations/versions:{LOCATION}", separator="os")
    assert host.alembic("heads").stdout.split() == ["h2", "(head)"]  # and nothing is said

    found = findings(host, 1)
    assert f"{SEPARATOR} = os" in found["location-split"]["message"]
    assert "not-reachable" not in found

    paste(host, found["location-split"]["hint"])
    assert "location-split" not in findings(host, 0)
    assert set(host.alembic("heads").stdout.split()) == {"h2", FINALIZE, "(head)"}


@pytest.mark.skipif(KNOWS_TOML, reason="Alembic 1.16 and newer know path_separator")
def test_path_separator_is_not_known_before_1_16(bare: Host) -> None:
    configure(bare, version_locations=f"\n    %(here)s/migrations/versions\n    {LOCATION}", path_separator="newline")

    done = bare.ours("doctor")  # the template's own line ends in a comment that Alembic takes for a part of it
    assert done.returncode == 2
    assert f"{SEPARATOR} = space, with nothing behind it" in done.stderr

    lines = bare.ini.read_text().splitlines()
    bare.ini.write_text("\n".join(line for line in lines if not line.startswith(SEPARATOR)) + "\n")
    found = findings(bare, 1)["location-split"]
    assert "1.16" in found["detail"]
    bare.ini.write_text(bare.ini.read_text().replace("\n    ", " "))
    paste(bare, found["hint"])

    assert set(findings(bare, 0)) == {"several-heads"}


def test_folder_with_a_space_gets_another_separator(tmp_path: Path, database: Database) -> None:
    folder = tmp_path / "my host"
    folder.mkdir()
    host = init(folder, database)
    configure(host, version_locations=LOCATION, separator="space")

    found = findings(host, 1)["location-unlisted"]
    paste(host, found["hint"])

    assert f"{SEPARATOR} = newline" in host.ini.read_text()
    assert "location-unlisted" not in findings(host, 0)


@pytest.mark.parametrize("location", ["openmemory_migrations:versionz", "openmemory_migration:versions"])
def test_typing_error_in_our_location(bare: Host, location: str) -> None:
    configure(bare, version_locations=f"%(here)s/migrations/versions {location}", separator="space")

    (found,) = findings(bare, 1).values()
    assert found["code"] in ("location-missing", "location-package")
    assert location in found["message"]

    paste(bare, found["hint"])
    assert set(findings(bare, 0)) == {"several-heads"}


def test_hosts_own_folder_is_not_listed(bare: Host) -> None:
    configure(bare, version_locations=LOCATION, separator="space")

    found = findings(bare, 1)
    paste(bare, found["location-unlisted"]["hint"])

    assert set(findings(bare, 0)) == {"several-heads"}
    assert "h2" in bare.alembic("heads").stdout


@toml
def test_location_in_pyproject(tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database, "pyproject")
    replace(host.toml, "[tool.alembic]", f'[tool.alembic]\nversion_locations = ["{LOCATION}z", "%(here)s/nothing"]')

    found = findings(host, 1)

    assert set(found) == {"location-missing", "location-unlisted"}
    assert host.ours("doctor").stdout.count("is not there") == 2
    where, line = found["location-unlisted"]["hint"].splitlines()
    assert where == "In pyproject.toml, [tool.alembic]:"
    assert '"%(here)s/migrations/versions"' in line


# -- history


def test_not_reachable_is_mended_by_the_command_it_names(bare: Host) -> None:
    found = findings(bare, 1)
    assert set(found) == {"not-reachable"}

    program, *arguments = shlex.split(found["not-reachable"]["hint"])
    assert program == "openmemory-migrations"
    bare.ours(*arguments, check=True)

    assert findings(bare, 0) == {}


def test_revision_of_the_hosts_own_that_calls_ops_is_enough(bare: Host) -> None:
    bare.add("h3", "from openmemory_migrations import ops\nrevision = 'h3'\ndown_revision = 'h2'\n")
    assert findings(bare, 0) == {}


def test_a_stub_is_lost(host: Host) -> None:
    (host.versions / f"{FINALIZE}_openmemory_finalize.py").unlink()

    assert FINALIZE in findings(host, 1)["partly-reachable"]["message"]


def test_history_that_cannot_be_read(host: Host) -> None:
    (host.versions / f"{BACKFILL}_openmemory_backfill.py").unlink()

    assert BACKFILL in findings(host, 2)["history-unreadable"]["message"]


def test_revision_is_there_twice(host: Host) -> None:
    configure(host, version_locations=f"%(here)s/migrations/versions {LOCATION}", separator="space")

    found = findings(host, 1)

    assert set(found) == {"revision-twice"}
    assert "and in" in found["revision-twice"]["detail"]
    assert LOCATION in found["revision-twice"]["hint"]
    configure(host, version_locations="%(here)s/migrations/versions")
    assert findings(host, 0) == {}


def test_two_heads_and_the_order_on_an_empty_database(bare: Host, database: Database) -> None:
    configure(bare, version_locations=f"{LOCATION} %(here)s/migrations/versions", separator="space")

    found = findings(bare, 0)["several-heads"]
    assert "order" in found["detail"]
    assert bare.alembic("upgrade", "head", check=False).returncode

    commands, other = found["hint"].splitlines()
    for command in commands.split(" && "):
        bare.alembic(*command.split()[1:])
    load(database, random_rows(10, 4))
    assert database.value("SELECT count(v_vector) FROM openmemory_vectors") == 10
    assert not mismatches(database)

    assert "openmemory-migrations stubs" in other
    configure(bare, version_locations="%(here)s/migrations/versions")
    bare.ours("stubs", check=True)
    assert findings(bare, 0) == {}


def test_two_heads_of_the_hosts_own(host: Host) -> None:
    host.add("h3", HISTORY["h2"].replace("h2", "h3"))

    found = findings(host, 0)["several-heads"]
    host.alembic(*shlex.split(found["hint"])[1:])

    assert findings(host, 0) == {}


def test_branch_label(host: Host) -> None:
    path = host.versions / f"{EXPAND}_openmemory_expand.py"
    replace(path, "branch_labels = None", 'branch_labels = ("openmemory",)')

    found = findings(host, 0)["branch-label"]

    line, _, where = found["hint"].partition(" in ")
    replace(Path(where), 'branch_labels = ("openmemory",)', line)
    assert findings(host, 0) == {}


# -- env.py


def test_connection_fails_and_the_rest_is_still_said(bare: Host) -> None:
    set_url(bare, "postgresql+psycopg2://nobody:secret@127.0.0.1:1/nowhere")

    found = findings(bare, 2)

    assert set(found) == {"not-reachable", "no-connection"}
    assert "secret" not in json.dumps(found)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_async_connection_fails(driver: str, tmp_path: Path) -> None:
    host = init(tmp_path, None, "async")
    host.ours("stubs", check=True)
    set_url(host, f"postgresql+{driver}://nobody:secret@127.0.0.1:1/nowhere")

    assert set(findings(host, 2)) == {"no-connection"}


def test_env_fails(host: Host) -> None:
    replace(host.env, "target_metadata = None", "target_metadata = no_such_name")

    found = findings(host, 2)["env-fails"]

    assert "no_such_name" in found["message"]
    assert re.search(r"env\.py, line \d+", found["detail"])


def test_env_runs_nothing(host: Host) -> None:
    replace(host.env, BEGIN, "        pass\n")

    found = findings(host, 1)["env-runs-nothing"]
    replace(host.env, "        pass\n", python(found["hint"]))

    assert findings(host, 0) == {}


def test_prints_of_env_py_stay_out_of_the_findings(host: Host) -> None:
    replace(host.env, BEGIN, f'        print("hello")\n{BEGIN}')
    assert findings(host, 0) == {}


def test_env_gets_the_x_arguments(host: Host) -> None:
    replace(host.env, BEGIN, f'        context.get_x_argument(as_dictionary=True)["tenant"]\n{BEGIN}')

    assert set(findings(host, 2)) == {"env-fails"}
    assert findings(host, 0, "-x", "tenant=one") == {}


def test_env_never_commits(host: Host, database: Database) -> None:
    replace(host.env, BEGIN, "        context.run_migrations()\n")

    found = findings(host, 1)["never-commits"]
    host.alembic("upgrade", "h2")
    assert not database.rows("SELECT FROM pg_tables WHERE schemaname = 'public'")  # exit code 0, nothing there

    replace(host.env, "        context.run_migrations()\n", python(found["hint"]))
    assert findings(host, 0) == {}
    host.alembic("upgrade", "h2")
    assert database.value("SELECT version_num FROM alembic_version") == "h2"


def test_env_executes_sql_before_configure(host: Host, database: Database) -> None:
    statement = "        connection.exec_driver_sql(\"SET lock_timeout = '5s'\")\n"
    replace(host.env, CONFIGURE, statement + CONFIGURE)

    found = findings(host, 1)["sql-before-configure"]
    assert "SET lock_timeout = '5s'" in found["message"]
    host.alembic("upgrade", "h2")
    assert not database.rows("SELECT FROM pg_tables WHERE schemaname = 'public'")

    replace(host.env, statement, statement + python(found["hint"]))
    assert findings(host, 0) == {}
    host.alembic("upgrade", "head")
    assert database.value("SELECT version_num FROM alembic_version") == FINALIZE


def test_commit_after_the_migrations_without_begin_transaction(host: Host) -> None:
    replace(host.env, BEGIN, "        context.run_migrations()\n        connection.commit()\n")

    found = findings(host, 1)["no-begin-transaction"]
    replace(host.env, "        context.run_migrations()\n", python(found["hint"]))

    assert findings(host, 0) == {}


def test_env_owns_the_transaction(host: Host, database: Database) -> None:
    replace(host.env, "connectable.connect()", "connectable.begin()")

    assert set(findings(host, 0)) == {"env-owns-transaction"}
    host.alembic("upgrade", "head")
    assert database.value("SELECT version_num FROM alembic_version") == FINALIZE


def test_async_env_owns_the_transaction(tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database, "async")
    host.ours("stubs", check=True)
    replace(host.env, "connectable.connect()", "connectable.begin()")

    assert set(findings(host, 0)) == {"env-owns-transaction"}


def test_set_local_in_the_hosts_transaction(host: Host) -> None:
    replace(host.env, "connectable.connect()", "connectable.begin()")
    replace(host.env, CONFIGURE, "        connection.exec_driver_sql(\"SET LOCAL lock_timeout = '5s'\")\n" + CONFIGURE)

    assert "SET LOCAL" in findings(host, 0)["env-owns-transaction"]["detail"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("target_metadata=target_metadata\n", "target_metadata=target_metadata, transaction_per_migration=True\n"),
        ("poolclass=pool.NullPool,", 'poolclass=pool.NullPool, isolation_level="AUTOCOMMIT",'),
        ("poolclass=pool.NullPool,", "pool_size=1, max_overflow=0,"),
    ],
    ids=["transaction per migration", "autocommit", "pool of one"],
)
def test_other_ways_that_are_fine(host: Host, old: str, new: str) -> None:
    replace(host.env, old, new)
    assert findings(host, 0) == {}


def test_savepoint(host: Host) -> None:
    replace(host.env, BEGIN, BEGIN.replace("context.begin_transaction()", "connection.begin_nested()"))

    found = findings(host, 1)["savepoint"]
    assert "begin_transaction()" in found["hint"]
    refused = host.alembic("upgrade", "head", check=False)
    assert "SAVEPOINT" in refused.log

    replace(host.env, "connection.begin_nested()", "context.begin_transaction()")
    assert findings(host, 0) == {}


def test_two_phase(tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database, "multidb")
    set_url(host, url(database, "psycopg2"))
    host.ours("stubs", check=True)
    replace(host.env, "USE_TWOPHASE = False", "USE_TWOPHASE = True")

    found = findings(host, 1)["two-phase"]
    assert "env-fails" not in findings(host, 1)

    replace(host.env, "USE_TWOPHASE = True", found["hint"].partition(",")[0])
    assert set(findings(host, 0)) == {"several-databases", "env-owns-transaction"}


def test_several_databases(tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database, "multidb")
    set_url(host, url(database, "psycopg2"))

    assert "--engine-name NAME" in findings(host, 1)["several-databases"]["hint"]
    host.ours("stubs", "--engine-name", "engine1", check=True)
    assert set(findings(host, 0)) == {"env-owns-transaction"}


def test_statements_that_write_are_not_sent(host: Host, database: Database) -> None:
    statement = '        connection.exec_driver_sql("CREATE SCHEMA IF NOT EXISTS app")\n        connection.commit()\n'
    replace(host.env, CONFIGURE, statement + CONFIGURE)

    found = findings(host, 0)

    assert set(found) == {"env-writes"}
    assert "CREATE SCHEMA IF NOT EXISTS app" in found["env-writes"]["message"]
    assert not database.rows("SELECT FROM pg_namespace WHERE nspname = 'app'")


@pytest.mark.parametrize(
    ("statement", "reads"),
    [
        ("/* app */ -- why\n select 1", True),
        ("WITH a AS (SELECT 1) SELECT * FROM a", True),
        ("WITH a AS (\nINSERT INTO b VALUES (1) RETURNING 1) SELECT * FROM a", False),
        ("SETTLE", False),
        ("ALTER DATABASE x SET search_path = app", False),
    ],
)
def test_which_statements_read(statement: str, reads: bool) -> None:
    assert bool(probe.READS.match(statement)) == reads


def test_sqlite(host: Host) -> None:
    set_url(host, "sqlite:///%(here)s/host.db")
    assert set(findings(host, 0)) == {"sqlite"}


def seen(dialect: str, driver: str, is_async: bool = False) -> Seen:
    connection: Any = SimpleNamespace(dialect=SimpleNamespace(name=dialect, driver=driver, is_async=is_async))
    return Seen(connection, (), "alembic_version", [], False, True, False, False, False, False)


@pytest.mark.parametrize(("driver", "is_async"), [("pg8000", False), ("psycopg2cffi", False), ("psycopg2", True)])
def test_driver_that_is_not_supported(driver: str, is_async: bool) -> None:
    (found,) = env_py.database(seen("postgresql", driver, is_async), several=False)
    assert (found.severity, found.code) == ("error", "driver")
    assert driver in found.message


def test_other_database() -> None:
    (found,) = env_py.database(seen("mysql", "pymysql"), several=False)
    assert (found.severity, found.code) == ("error", "not-postgresql")


# -- version table


def test_version_table_is_shared_with_a_stranger(host: Host, database: Database) -> None:
    host.alembic("upgrade", "head")
    database.run("INSERT INTO alembic_version VALUES ('5c1e0f')")

    found = findings(host, 1)["version-table-shared"]

    assert '"5c1e0f"' in found["message"]
    assert host.alembic("upgrade", "head", check=False).returncode
    replace(host.env, "target_metadata=target_metadata\n", 'target_metadata=target_metadata, version_table="own"\n')
    assert findings(host, 0) == {}


def test_stubs_are_lost_after_the_migration(host: Host) -> None:
    host.alembic("upgrade", "head")
    for path in host.versions.glob("om_*"):
        path.unlink()

    found = findings(host, 1)

    assert set(found) == {"not-reachable", "version-table-shared"}
    assert "Restore" in found["version-table-shared"]["hint"]


# -- the command itself


@pytest.mark.parametrize("arguments", [[], ["no-such"], ["doctor", "--no-such"], ["doctor", "--config", "no.ini"]])
def test_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    done: Result = Host(tmp_path).ours(*arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
