"""openmemory-migrations stubs: in hosts made by the real `alembic init`, the real command, and the end state."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg2.sql import SQL, Identifier

from openmemory_migrations.cli.stubs import HINTS
from openmemory_migrations.hosts.project import KNOWS_TOML, REVISIONS
from tests.support.commands import ROOT
from tests.support.databases import Databases
from tests.support.host_init import HISTORY, Host, configure, init, replace, set_url, url
from tests.support.openmemory import (
    Database,
    checksum,
    expected,
    load,
    mismatches,
    random_rows,
)

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

TEMPLATES = ["generic", "async", *(["pyproject", "pyproject_async"] if KNOWS_TOML else [])]
EXPAND, BACKFILL, FINALIZE = REVISIONS


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """One that has no database: stubs asks none."""
    return init(tmp_path, None)


def written(host: Host) -> list[Path]:
    return sorted(path for path in host.versions.rglob("*") if path.is_file() and path.stem not in HISTORY)


def value_of(path: Path, name: str) -> object:
    """What `name = …` at the top of the file says."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"no {name} in {path}")


def columns(database: Database, table: str) -> list[str]:
    return [
        name
        for (name,) in database.rows("SELECT column_name FROM information_schema.columns WHERE table_name = %s", table)
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_life_cycle_in_a_host_with_history(template: str, tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database, template)
    host.alembic("upgrade", "head")
    load(database, random_rows(500, 8))
    before = checksum(database)

    stubs = host.ours("stubs", check=True)

    assert [host.folder / line for line in stubs.stdout.splitlines()] == [
        host.versions / f"{EXPAND}_openmemory_expand.py",
        host.versions / f"{BACKFILL}_openmemory_backfill.py",
        host.versions / f"{FINALIZE}_openmemory_finalize.py",
    ]
    assert 'follow "h2", the only head' in stubs.stderr
    assert "alembic upgrade head" in stubs.stderr
    assert host.alembic("heads").stdout.split() == [FINALIZE, "(head)"]
    for _ in range(2):
        host.alembic("upgrade", "head")
        assert not mismatches(database)
        assert database.value("SELECT count(v_vector) FROM openmemory_vectors") == 500
        host.alembic("downgrade", "h2")
        assert "v_vector" not in columns(database, "openmemory_vectors")
        assert checksum(database) == before
        assert database.rows("SELECT version_num FROM alembic_version") == [("h2",)]


@pytest.fixture
def other(databases: Databases) -> Iterator[Database]:
    with databases.empty() as database:
        yield database


def test_multidb_host_names_the_engine_that_has_the_table(tmp_path: Path, database: Database, other: Database) -> None:
    one_engine = {
        "h1": HISTORY["h1"]
        .replace("op.execute(", 'if kw["engine_name"] == "engine1": op.execute(', 1)
        .replace('    op.execute("DROP', '    if kw["engine_name"] == "engine1": op.execute("DROP')
    }
    host = init(tmp_path, database, "multidb", history=one_engine)
    set_url(host, url(database, "psycopg2"), url(other, "psycopg2"))

    assert "--engine-name" in host.ours("stubs", check=True).stderr
    host.alembic("upgrade", "h1")
    load(database, random_rows(100, 8))
    refused = host.alembic("upgrade", "head", check=False)
    assert refused.returncode
    assert "does not exist" in refused.log

    for path in written(host):
        path.unlink()
    host.ours("stubs", "--engine-name", "engine1", check=True)
    host.alembic("upgrade", "head")

    assert not mismatches(database)
    assert database.value("SELECT count(v_vector) FROM openmemory_vectors") == 100
    assert not columns(other, "openmemory_vectors")
    assert other.value("SELECT version_num FROM alembic_version") == FINALIZE
    host.alembic("downgrade", "h1")
    assert "v_vector" not in columns(database, "openmemory_vectors")


def test_other_table_columns_and_bigint_key(tmp_path: Path, database: Database) -> None:
    host = init(tmp_path, database)
    database.run('CREATE SCHEMA "My app"')
    table = SQL(".").join([Identifier("My app"), Identifier("text chunks")])
    database.run(SQL('CREATE TABLE {} (nr bigint PRIMARY KEY, "raw % :bytes" bytea)').format(table))
    rows = [(nr, row.v) for nr, row in enumerate(random_rows(300, 5))]
    for nr, v in rows:
        database.run(SQL("INSERT INTO {} VALUES (%s, %s)").format(table), nr, v)
    names = ["--schema", "My app", "--table", "text chunks", "--column", "raw % :bytes", "--vector-column", "embedding"]

    host.ours("stubs", *names, "--dimensions", "5", "--index", "hnsw", "--index-metric", "cosine", check=True)
    host.alembic("upgrade", "head")

    sent = dict(database.rows(SQL("SELECT nr, vector_send(embedding) FROM {}").format(table)))
    assert {nr: bytes(one) for nr, one in sent.items()} == {nr: expected(v, 5) for nr, v in rows}
    index = database.value("SELECT indexdef FROM pg_indexes WHERE tablename = 'text chunks' AND indexdef LIKE '%hnsw%'")
    assert "vector_cosine_ops" in index
    host.alembic("downgrade", "h2")
    assert columns(database, "text chunks") == ["nr", "raw % :bytes"]


def test_second_run_is_refused_and_changes_nothing(host: Host) -> None:
    host.ours("stubs", check=True)
    before = {path: path.read_bytes() for path in written(host)}

    again = host.ours("stubs")

    assert again.returncode == 1
    assert again.stdout == ""
    assert re.search(r'ERROR:  revision "om_\w+" is there already, in migrations/versions/om_', again.stderr)
    assert {path: path.read_bytes() for path in written(host)} == before


def test_id_under_another_file_name_is_seen(host: Host) -> None:
    host.add("ours_by_hand", f"revision: str = '{FINALIZE}'\ndown_revision = 'h2'\n")

    refused = host.ours("stubs")

    assert refused.returncode == 1
    assert "ours_by_hand.py" in refused.stderr
    assert len(written(host)) == 1


def test_nothing_is_written_when_one_file_is_in_the_way(host: Host) -> None:
    host.add(f"{FINALIZE}_openmemory_finalize", "revision = 'h3'\ndown_revision = 'h2'\n")

    refused = host.ours("stubs")

    assert refused.returncode == 1
    assert "finalize.py is there already" in refused.stderr
    assert len(written(host)) == 1


def file_template(host: Host, template: str) -> None:
    configure(host, file_template=template)


def test_names_follow_the_hosts_file_template(host: Host) -> None:
    file_template(host, "%%(year)d-%%(month).2d-%%(day).2d_%%(hour).2d%%(minute).2d_%%(rev)s_%%(slug)s")

    lines = host.ours("stubs", check=True).stdout.splitlines()

    pattern = r"migrations/versions/\d{4}-\d\d-\d\d_\d{4}_(om_\w+)_openmemory_(expand|backfill|finalize)\.py"
    assert [re.fullmatch(pattern, line)[1] for line in lines] == list(REVISIONS)  # type: ignore[index]
    assert lines == sorted(lines)


def test_template_of_a_time_only_gives_three_names(host: Host) -> None:
    file_template(host, "%%(epoch)s")
    assert len(set(host.ours("stubs", check=True).stdout.splitlines())) == 3


def test_template_that_gives_one_name_is_refused(host: Host) -> None:
    file_template(host, "revision")

    refused = host.ours("stubs")

    assert refused.returncode == 1
    assert "%%(rev)s" in refused.stderr
    assert not written(host)


def test_folders_in_the_template(host: Host) -> None:
    file_template(host, "%%(year)d/%%(rev)s")

    refused = host.ours("stubs")
    assert refused.returncode == 1
    assert "recursive_version_locations = true" in refused.stderr
    assert not written(host)
    assert not [path for path in host.versions.iterdir() if path.is_dir() and path.name.isdigit()]

    configure(host, recursive_version_locations="true")
    host.ours("stubs", check=True)
    assert FINALIZE in host.alembic("heads").stdout


@pytest.mark.skipif(not KNOWS_TOML, reason="pyproject.toml is new in Alembic 1.16")
def test_template_of_pyproject_without_ini(tmp_path: Path) -> None:
    host = init(tmp_path, None, "pyproject")
    host.ini.unlink()
    replace(host.toml, "[tool.alembic]", '[tool.alembic]\nfile_template = "%%(slug)s-%%(rev)s"')

    lines = host.ours("stubs", check=True).stdout.splitlines()

    assert lines[0] == f"migrations/versions/openmemory_expand-{EXPAND}.py"


def test_config_elsewhere(host: Host) -> None:
    folder = host.folder / "config"
    folder.mkdir()
    configure(host, script_location="%(here)s/../migrations")
    host.ini.rename(folder / "db.ini")

    assert host.ours("stubs").returncode == 2
    host.ours("stubs", "--config", "config/db.ini", "--down-revision", "head", check=True)

    assert value_of(written(host)[-1], "revision") == FINALIZE


def test_folder_alone_is_enough_without_configuration(host: Host) -> None:
    host.ini.unlink()

    refused = host.ours("stubs")
    assert refused.returncode == 2
    assert "--directory" in refused.stderr

    host.ours("stubs", "--directory", "migrations/versions", check=True)
    assert value_of(host.versions / f"{EXPAND}_openmemory_expand.py", "down_revision") == "h2"


@pytest.mark.parametrize(
    ("given", "message", "detail"),
    [
        ("nope", 'the host has no revision "nope"', 'The heads are: "h2".'),
        ("h1", 'revision "h1" is not a head', 'The heads are: "h2".'),
        ("h1,h2", "one down revision only", 'The heads are: "h2".'),
    ],
)
def test_wrong_down_revision_is_refused_with_the_heads(host: Host, given: str, message: str, detail: str) -> None:
    refused = host.ours("stubs", "--down-revision", given)

    assert refused.returncode == 2
    assert f"ERROR:  {message}" in refused.stderr
    assert f"DETAIL:  {detail}" in refused.stderr
    assert not written(host)


def test_two_heads_have_to_be_chosen_from(host: Host) -> None:
    host.add("h3", HISTORY["h2"].replace("h2", "h3"))

    refused = host.ours("stubs")
    assert refused.returncode == 2
    assert '"h2", "h3"' in refused.stderr

    chosen = host.ours("stubs", "--down-revision", "h3", check=True)
    assert value_of(host.folder / chosen.stdout.splitlines()[0], "down_revision") == "h3"


def test_base_in_a_host_with_history_is_done_with_a_warning(host: Host) -> None:
    done = host.ours("stubs", "--down-revision", "base", check=True)

    assert "WARNING:" in done.stderr
    assert value_of(host.folder / done.stdout.splitlines()[0], "down_revision") is None


def test_host_without_revisions_begins_with_ours(tmp_path: Path) -> None:
    host = init(tmp_path, None, history={})

    done = host.ours("stubs", check=True)

    assert value_of(host.folder / done.stdout.splitlines()[0], "down_revision") is None
    assert FINALIZE in host.alembic("heads").stdout


def test_history_that_only_env_py_can_import(host: Host) -> None:
    host.add("h3", "import app_models\nrevision = 'h3'\ndown_revision = 'h2'\n")

    refused = host.ours("stubs")
    assert refused.returncode == 2
    assert "No module named 'app_models'" in refused.stderr

    done = host.ours("stubs", "--down-revision", "h3", check=True)
    assert "not checked" in done.stderr
    assert value_of(host.folder / done.stdout.splitlines()[0], "down_revision") == "h3"


@pytest.mark.parametrize("separator", ["os", "space"])
def test_both_ways_together_are_refused(host: Host, separator: str) -> None:
    between = {"os": ":", "space": " "}[separator]
    locations = f"%(here)s/migrations/versions{between}openmemory_migrations:versions"
    configure(host, version_locations=locations, separator=separator)

    refused = host.ours("stubs", "--directory", "migrations/versions", "--down-revision", "h2")

    assert refused.returncode == 1
    assert "can't be combined" in refused.stderr
    assert not written(host)


def test_folder_where_alembic_does_not_look_is_refused(host: Host) -> None:
    (host.folder / "elsewhere").mkdir()

    refused = host.ours("stubs", "--directory", "elsewhere")

    assert refused.returncode == 2
    assert "--directory migrations/versions" in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dimensions", "0"],
        ["--table", ""],
        ["--column", "x" * 64],
        ["--column", "v_vector"],
        ["--index-m", "40"],
        ["--index", "btree"],
        ["--batch", "10"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_refused_before_anything_is_written(host: Host, arguments: list[str]) -> None:
    refused = host.ours("stubs", *arguments)

    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert not written(host)


@pytest.mark.parametrize("many", [False, True])
def test_files_please_ruff_and_mypy(host: Host, many: bool) -> None:
    options = ["--schema", 'with "quotes"', "--table", "chunks", "--engine-name", "engine1", "--no-sync-trigger"]
    lines = host.ours("stubs", *(options if many else []), check=True).stdout.splitlines()

    for command in (
        ["ruff", "check", "--isolated", "--select", "E,F,W,I,UP,B"],
        ["ruff", "format", "--isolated", "--check", "--diff"],
        ["mypy", "--strict", "--config-file=", "--follow-imports=silent"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command, *lines],
            cwd=host.folder,
            env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin", "MYPY_CACHE_DIR": str(host.folder / ".mypy")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_call_has_the_same_arguments(host: Host) -> None:
    arguments = ["--schema", "app", "--dimensions", "384", "--no-sync-trigger", "--index", "none"]
    lines = host.ours("stubs", *arguments, check=True).stdout.splitlines()

    calls = [
        {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        for line in lines
        for node in ast.walk(ast.parse((host.folder / line).read_text()))
        if isinstance(node, ast.Call)
    ]
    assert calls == [{"schema": "app", "dimensions": 384, "sync_trigger": False, "index": "none"}] * 6


def test_no_branch_label(host: Host) -> None:
    for line in host.ours("stubs", check=True).stdout.splitlines():
        assert value_of(host.folder / line, "branch_labels") is None
        assert value_of(host.folder / line, "depends_on") is None


def test_options_of_one_run_are_left_to_the_environment() -> None:
    assert "schema" in HINTS
    assert not {"batch", "accept_loss"} & set(HINTS)
