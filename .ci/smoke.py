"""Migrate with the installed wheel, away from the repo, in a project of nothing but a two-line env.py."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg2

from openmemory_migrations import embedded

REVISIONS = [
    "20240107000000_pgvector.py",
    "20240107000001_pgvector_backfill.py",
    "20240108000000_pgvector_finalize.py",
]
CUTOVER = "cutover/versions/20240109000000_cutover.py"
INI = """
[alembic]
script_location = %(here)s/alembic
version_locations = openmemory_migrations:versions
path_separator = space
"""
ENV = """
from openmemory_migrations.environment import run

run()
"""
# a hundred times 1.0 and -2.0, little-endian
TABLE = r"""
CREATE TABLE openmemory_vectors
    (id uuid, sector text, user_id text, v bytea, dim integer NOT NULL, PRIMARY KEY (id, sector));
INSERT INTO openmemory_vectors
    SELECT gen_random_uuid(), 'semantic', 'user', '\x0000803f000000c0', 2 FROM generate_series(1, 100);
"""


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"openmemory_migrations"}, tops
    inside = ["py.typed", CUTOVER, *(f"versions/{name}" for name in REVISIONS)]
    assert {f"openmemory_migrations/{name}" for name in inside}.issubset(names), names
    installed = Path(str(files("openmemory_migrations")))
    assert installed.is_relative_to(sys.prefix), installed
    assert all((installed / name).is_file() for name in inside), installed


def migrate(project: Path, url: str) -> None:
    (project / "alembic").mkdir()
    (project / "alembic.ini").write_text(INI)
    (project / "alembic" / "env.py").write_text(ENV)
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(TABLE)
        run("alembic", project, url, "upgrade", "head")
        cursor.execute("SELECT v_vector::text, count(*) FROM openmemory_vectors GROUP BY 1")
        assert cursor.fetchall() == [("[1,-2]", 100)]
        run("alembic", project, url, "downgrade", "base")
        cursor.execute("SELECT * FROM openmemory_vectors")
        assert len(cursor.description or ()) == 5
        with TemporaryDirectory() as empty:
            for arguments in (
                *(["check"], ["upgrade", "om_20240107_pgvector"], ["backfill"], ["upgrade"], ["status"]),
                *(["verify"], ["tune"], ["index", "--rebuild"], ["report", "--output", "report.html"]),
            ):
                run("openmemory-migrations", Path(empty), url, *arguments)
            assert (Path(empty) / "report.html").read_text().startswith("<!DOCTYPE html>")
            cursor.execute("SELECT v_vector::text, count(*) FROM openmemory_vectors GROUP BY 1")
            assert cursor.fetchall() == [("[1,-2]", 100)]
            for mode, column in (("swap", "v"), ("drop", "v_vector")):
                run("openmemory-migrations", Path(empty), url, "cutover", "upgrade", "-x", f"cutover={mode}")
                cursor.execute(f"SELECT {column}::text, count(*) FROM openmemory_vectors GROUP BY 1")
                assert cursor.fetchall() == [("[1,-2]", 100)]
                run("openmemory-migrations", Path(empty), url, "cutover", "downgrade")
                cursor.execute("SELECT encode(v, 'hex'), count(*) FROM openmemory_vectors GROUP BY 1")
                assert cursor.fetchall() == [("0000803f000000c0", 100)]
    connection.close()


def run(program: str, folder: Path, url: str, *arguments: str) -> None:
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    subprocess.run(command, cwd=folder, env={"OM_DATABASE_URL": url}, check=True)


if __name__ == "__main__":
    check_contents(Path(sys.argv[1]))
    with TemporaryDirectory() as folder, embedded.temporary() as server:
        migrate(Path(folder), server.url())
    print("the wheel works on its own")
