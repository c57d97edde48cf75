"""What `alembic upgrade head` says, under our own alembic.ini and inside a stock Alembic project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from demo.openmemory import TABLE, environment
from tests.support import forkserver
from tests.support.commands import NOTHING, Result, alembic, result
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, pack, random_rows
from tests.support.states import HEAD, INDEX, IVFFLAT, column_type, follows, indexes, snapshot, without_extension

BACKFILL_LINE = re.compile(
    rf"NOTICE:  backfill {TABLE}: (?P<done>[\d,]+) of (?P<total>[\d,]+) rows \((?P<percent>\d+) %\),"
    r" (?P<rate>[\d,]+) rows/s(?:, (?P<left>.+) left)?(?:, (?P<skipped>[\d,]+) skipped)?$",
    re.MULTILINE,
)
NAN = float("nan")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project as `alembic init` makes it, with our revisions and no line of ours in its env.py."""
    ini = tmp_path / "alembic.ini"
    command.init(Config(ini), str(tmp_path / "migrations"), template="generic")
    text = ini.read_text()
    text = text.replace("path_separator = os", "path_separator = space")
    text = text.replace(
        "sqlalchemy.url = driver://user:pass@localhost/dbname",
        "sqlalchemy.url = URL\nversion_locations = %(here)s/migrations/versions openmemory_migrations:versions",
    )
    ini.write_text(text)
    return tmp_path


def stock_alembic(
    project: Path, database: Database, *args: str, env: Mapping[str, str] = NOTHING, check: bool = True
) -> Result:
    ini = project / "alembic.ini"
    url = database.url.replace("postgresql://", "postgresql+psycopg2://").replace("%", "%%")
    ini.write_text(re.sub("^sqlalchemy.url = .*$", lambda _: f"sqlalchemy.url = {url}", ini.read_text(), flags=re.M))
    done = result(forkserver.start(["-m", "alembic", *args], cwd=project, env=environment(None, env)))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def filled(database: Database, count: int = 1234, bad: int = 10) -> None:
    rows = random_rows(count, 8)
    create_table(database)
    load(database, [row._replace(v=pack([NAN] * 8)) if i < bad else row for i, row in enumerate(rows)])


def test_every_line_is_in_postgres_manner_and_the_counts_are_right(database: Database) -> None:
    filled(database)

    result = alembic(database, "upgrade", "head")

    assert result.stdout == ""
    for line in result.stderr.splitlines():
        assert re.match(r"(NOTICE|WARNING|DETAIL|HINT):  \S|INFO  \[alembic\.", line), line
    (found,) = BACKFILL_LINE.finditer(result.stderr)
    assert (found["done"], found["total"], found["percent"]) == ("1,224", "1,234", "100")
    assert (found["left"], found["skipped"]) == (None, "10")
    assert int(found["rate"].replace(",", "")) > 0
    assert re.search(r"^WARNING:  10 rows of .* can't be converted and were skipped$", result.stderr, re.MULTILINE)
    assert re.search(r"^DETAIL:  NaN or infinite values: 10 \(such as \(id=", result.stderr, re.MULTILINE)


def test_the_end_point_of_each_step_is_said_on_the_way_down(database: Database) -> None:
    filled(database)
    alembic(database, "upgrade", "head")

    result = alembic(database, "downgrade", "base")

    for said in [f'NOTICE:  index "{INDEX}"', "NOTICE:  nothing to undo", 'NOTICE:  column "v_vector"']:
        assert re.search(f"^{said}", result.stderr, re.MULTILINE), said


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"OM_INDEX_LISTS": "90"}, "NOTICE:  ivfflat index created with little data"),
        (
            {"OM_INDEX": "hnsw", "OM_INDEX_MEMORY": "1MB"},
            "NOTICE:  hnsw graph no longer fits into maintenance_work_mem",
        ),
    ],
)
def test_the_servers_own_notices_come_through(database: Database, env: dict[str, str], said: str) -> None:
    create_table(database)
    load(database, random_rows(80 if "OM_INDEX_LISTS" in env else 900, 384))

    result = alembic(database, "upgrade", "head", env=env)

    assert re.search(f"^{said}", result.stderr, re.MULTILINE)
    # what the server adds in DETAIL and HINT is not lost either
    assert re.search(rf"^{said}.*\n(DETAIL|HINT):  ", result.stderr, re.MULTILINE)


def test_a_stock_project_gives_the_same_table_and_the_same_log(project: Path, database: Database) -> None:
    filled(database)
    v, before = checksum(database), snapshot(database)

    # so many lists that the server has something to say, too
    result = stock_alembic(project, database, "upgrade", "head", env={"OM_INDEX_LISTS": "2000"})

    assert column_type(database) == "vector(8)"
    assert mismatches(database, dim=8) == []
    assert checksum(database) == v
    assert indexes(database) == {INDEX: (IVFFLAT.replace("'1'", "'2000'"), True)}
    assert follows(database, 8)
    assert database.rows("SELECT version_num FROM alembic_version") == [(HEAD,)]
    logger = r"INFO  \[alembic\.openmemory_migrations\] "
    assert re.search(f"^{logger}NOTICE:  column", result.stderr, re.MULTILINE)
    assert re.search(f"^{logger}NOTICE:  ivfflat index created with little data", result.stderr, re.MULTILINE)
    (found,) = BACKFILL_LINE.finditer(result.stderr)
    assert (found["done"], found["total"], found["skipped"]) == ("1,224", "1,234", "10")
    assert re.search(r"^WARN\w* +\[alembic\.openmemory_migrations\] WARNING:  10 rows", result.stderr, re.MULTILINE)

    stock_alembic(project, database, "downgrade", "base")
    database.run("DROP TABLE alembic_version")
    assert without_extension(snapshot(database)) == before


def test_a_stock_project_gets_an_error_without_a_traceback(project: Path, database: Database) -> None:
    result = stock_alembic(project, database, "upgrade", "head", check=False)

    assert result.returncode != 0
    assert 'FAILED: table "public.openmemory_vectors" does not exist' in result.log
    assert "Traceback" not in result.log
    assert snapshot(database)["relations"] == []
