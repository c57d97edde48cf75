"""`alembic check` in host projects: it proposes nothing about what is ours, and something without our function."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from openmemory_migrations import models
from openmemory_migrations.index import choice
from tests.support.commands import ROOT, alembic
from tests.support.host_styles import HOSTS, STUBS, Host, create
from tests.support.openmemory import Database, load, random_rows

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

SETTINGS = {"OM_VEC_DIM": "64"}
NOTES = """
import sqlalchemy as sa
from openmemory_migrations import autogenerate, models

metadata = sa.MetaData()
sa.Table(
    "notes", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.Text, nullable=False)
)
"""
WITHOUT = (HOSTS / "base" / "models.py").read_text() + "\nfrom openmemory_migrations import autogenerate\n"
# a host's own way to map it, without the comment by which this package knows the column
BY_HAND = "from pgvector.sqlalchemy import VECTOR\n" + WITHOUT.replace(
    'sa.Column("dim"', 'sa.Column("v_vector", VECTOR(64)), sa.Column("dim"'
)
MAPPED = NOTES + "models.vectors_table(metadata, dimensions=64)\n"
OURS = "from models import autogenerate\ninclude_object = autogenerate.include_object\n"
COMBINED = """
from models import autogenerate

def include_object(object, name, type_, reflected, compare_to):
    if type_ == "table" and name == "theirs":
        return False
    return autogenerate.include_object(object, name, type_, reflected, compare_to)
"""


@pytest.fixture
def host(database: Database, tmp_path: Path) -> Host:
    """A host at its head, with rows, so that there is an index."""
    host = create(tmp_path / "host", "generic", database, settings=SETTINGS)
    host.alembic("upgrade", "host_2")
    load(database, random_rows(200, 64))
    host.alembic("upgrade", "head")
    return host


def proposed(host: Host, text: str, include: str, more: str = "", *args: str) -> list[str]:
    """What the real `alembic check` proposes, such as `remove_index`, with these models and this include_object."""
    (host.folder / "models.py").write_text(text)
    env = (HOSTS / "generic" / "migrations" / "env.py").read_text()
    if include:
        env = env.replace("config = context.config", include + "\nconfig = context.config", 1)
        more = "include_object=include_object, " + more
    host.env.write_text(env.replace("target_metadata=target_metadata", f"{more} target_metadata=target_metadata"))
    checked = host.alembic(*args, "check", check=False)
    if checked.returncode == 0:
        assert "No new upgrade operations detected." in checked.log
        return []
    (line,) = [line for line in checked.log.splitlines() if "FAILED: New upgrade operations detected" in line]
    return sorted(re.findall(r"\('((?:add|remove|modify)_\w+)'", line))


@pytest.mark.parametrize(
    ("text", "otherwise"),
    [
        pytest.param(MAPPED, ["remove_index"], id="mapped"),
        pytest.param(BY_HAND, ["modify_comment", "remove_index"], id="mapped by hand"),
        pytest.param(WITHOUT, ["remove_column", "remove_index"], id="mapped without v_vector"),
        pytest.param(NOTES, ["remove_index", "remove_index", "remove_table"], id="not mapped"),
    ],
)
def test_nothing_of_ours_is_proposed_with_our_function_and_something_is_without(
    host: Host, text: str, otherwise: list[str]
) -> None:
    assert proposed(host, text, OURS) == []
    assert proposed(host, text, "") == otherwise


def test_what_the_host_has_forgotten_is_still_proposed(host: Host, database: Database) -> None:
    database.run("ALTER TABLE openmemory_vectors ADD theirs text; CREATE INDEX theirs_idx ON openmemory_vectors (dim)")
    database.run("CREATE TABLE theirs (id integer PRIMARY KEY)")
    assert proposed(host, MAPPED, OURS) == ["remove_column", "remove_index", "remove_table"]
    wanted = MAPPED.replace("dimensions=64)", "dimensions=64).append_column(sa.Column('wanted', sa.Text))")
    assert proposed(host, wanted, OURS) == ["add_column", "remove_column", "remove_index", "remove_table"]


def test_it_combines_with_a_function_of_the_hosts_own(host: Host, database: Database) -> None:
    database.run("CREATE TABLE theirs (id integer PRIMARY KEY)")
    for text in (MAPPED, WITHOUT, NOTES):
        assert proposed(host, text, COMBINED) == []
    assert proposed(host, WITHOUT, OURS) == ["remove_table"]


def test_the_version_table_of_the_package_on_its_own_is_hidden(host: Host, database: Database) -> None:
    database.run("CREATE TABLE openmemory_alembic_version (version_num varchar(32) PRIMARY KEY)")
    assert proposed(host, MAPPED, OURS) == []
    assert proposed(host, MAPPED, "") == ["remove_index", "remove_table"]


def test_another_dimension_than_the_mapped_one_is_proposed(host: Host) -> None:
    assert proposed(host, MAPPED.replace("64", "32"), OURS) == ["modify_type"]


def test_the_other_names_of_the_index_are_hidden(host: Host, database: Database) -> None:
    for name in ("vvector_ivfflat_idx", "vvector_idx_new", "vvector_idx_old"):
        database.run(
            f"CREATE INDEX openmemory_vectors_{name} ON openmemory_vectors USING ivfflat (v_vector vector_l2_ops)"
        )
    assert proposed(host, MAPPED, OURS) == []


@pytest.mark.parametrize(
    ("kind", "metric"), [("ivfflat", "l2"), pytest.param("hnsw", "cosine", marks=pytest.mark.slow)]
)
def test_a_mapped_index_needs_no_function(host: Host, kind: str, metric: str) -> None:
    host.alembic("downgrade", STUBS[1])
    host.alembic("upgrade", "head", env={"OM_INDEX": kind, "OM_INDEX_METRIC": metric})
    index = MAPPED.replace("dimensions=64", f"dimensions=64, index={kind!r}, index_metric={metric!r}")
    assert proposed(host, index, "") == []
    assert proposed(host, index, OURS) == []


def test_a_mapped_index_that_an_empty_table_cannot_have_is_not_proposed(database: Database, tmp_path: Path) -> None:
    host = create(tmp_path / "host", "generic", database, settings=SETTINGS)
    host.alembic("upgrade", "head")
    index = MAPPED.replace("dimensions=64", "dimensions=64, index='ivfflat'")
    assert proposed(host, index, OURS) == []
    assert proposed(host, index, "") == ["add_index"]


def test_the_table_is_found_by_the_settings(database: Database, tmp_path: Path) -> None:
    host = create(tmp_path / "host", "generic", database, settings=SETTINGS)
    versions = host.folder / "migrations/versions"
    first = versions / "host_1_vectors.py"
    first.write_text(first.read_text().replace('"openmemory_vectors"', '"vectors"'))
    host.alembic("-x", "vector_table=vectors", "-x", "index=hnsw", "upgrade", "head")
    mapped = MAPPED.replace("metadata, dim", 'metadata, table="vectors", dim')
    without = WITHOUT.replace('    "openmemory_vectors"', '    "vectors"')
    for text in (mapped, without, NOTES):
        assert proposed(host, text, OURS, "", "-x", "vector_table=vectors") == []
        assert proposed(host, text, OURS) != []


def test_a_schema_of_its_own(database: Database, tmp_path: Path) -> None:
    settings = SETTINGS | {"OM_PG_SCHEMA": "memory", "OM_INDEX": "hnsw"}
    host = create(tmp_path / "host", "generic", database, settings=settings)
    database.run("CREATE SCHEMA memory")
    first = host.folder / "migrations/versions/host_1_vectors.py"
    first.write_text(
        first.read_text()
        .replace("nullable=False),\n    )", 'nullable=False),\n        schema="memory",\n    )')
        .replace('["user_id"])', '["user_id"], schema="memory")')
    )
    host.alembic("upgrade", "head")
    assert database.value("SELECT to_regclass('memory.openmemory_vectors_vvector_idx') IS NOT NULL")
    mapped = MAPPED.replace("metadata, dim", 'metadata, schema="memory", dim')
    for text in (mapped, NOTES):
        assert proposed(host, text, OURS, "include_schemas=True,") == []
        assert proposed(host, text, "", "include_schemas=True,") != []


CHUNKS = """
import sqlalchemy as sa
from openmemory_migrations import autogenerate

metadata = sa.MetaData()
sa.Table(
    "chunks",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("embedding", sa.LargeBinary),
)
"""
HIDING = """
from models import autogenerate
include_object = autogenerate.hiding(table="chunks", vector_column="vector", schema={schema})
"""


@pytest.mark.parametrize("schema", ["public", pytest.param(None, marks=pytest.mark.slow)])
def test_another_table_is_hidden_by_a_function_made_for_it(
    database: Database, tmp_path: Path, schema: str | None
) -> None:
    host = create(tmp_path / "host", "generic", database)
    versions = host.folder / "migrations/versions"
    (versions / "host_2_notes.py").unlink()
    options = 'schema="public", table="chunks", column="embedding", vector_column="vector", dimensions=3, index="hnsw"'
    for path in versions.glob("om_*.py"):
        text = re.sub(r"(ops\.\w+)\(\)", rf"\1({options})", path.read_text())
        path.write_text(text.replace('"host_2"', '"host_1"'))
    (versions / "host_1_vectors.py").write_text(
        "from alembic import op\nrevision = 'host_1'\ndown_revision = None\n"
        "def upgrade(): op.execute('CREATE TABLE chunks (id bigint PRIMARY KEY, embedding bytea)')\n"
        "def downgrade(): op.execute('DROP TABLE chunks')\n"
    )
    host.alembic("upgrade", "head")
    include = HIDING.format(schema=repr(schema))
    assert proposed(host, CHUNKS, include) == []
    assert proposed(host, CHUNKS, "") == ["remove_column", "remove_index"]
    # it is the host's own table, which it may give up
    assert proposed(host, NOTES.split("sa.Table")[0], include) == ["remove_table"]


def test_more_dimensions_than_an_index_takes_cannot_be_mapped_with_one() -> None:
    import sqlalchemy as sa

    with pytest.raises(ValueError, match="2,000"):
        models.vectors_table(sa.MetaData(), dimensions=choice.INDEX_DIMENSIONS + 1, index="hnsw")


def test_importing_it_brings_neither_numpy_nor_a_driver() -> None:
    code = "import sys, openmemory_migrations.autogenerate; print({'numpy', 'psycopg2', 'pgvector'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("mode", ["swap", "drop"])
def test_after_the_cutover_nothing_of_ours_is_proposed_either(host: Host, database: Database, mode: str) -> None:
    database.run("INSERT INTO openmemory_vectors VALUES (gen_random_uuid(), 'semantic', 'user', 'x', 1)")
    alembic(database, "-n", "cutover", "upgrade", "head", env={"OM_CUTOVER": mode, "OM_ACCEPT_LOSS": "1"})
    assert database.value("SELECT count(*) FROM openmemory_vectors_v_kept") == 1
    column = '    sa.Column("v", sa.LargeBinary),\n'
    mapped = BY_HAND.replace(column, "")
    if mode == "swap":
        by_hand = 'sa.Column("v_vector", VECTOR(64)), '
        mapped = BY_HAND.replace(column, column.replace("sa.LargeBinary", "VECTOR(64)")).replace(by_hand, "")

    assert proposed(host, mapped, OURS) == []
    assert "remove_table" in proposed(host, mapped, "")
