"""Citus: what its rules ask of every statement, seen on a plain server, and the chain itself on a coordinator."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg2
import pytest
from psycopg2.sql import SQL, Identifier
from sqlalchemy.engine import make_url

from demo.openmemory import TABLE
from tests.support.commands import alembic, om, result, start_alembic
from tests.support.interruption import kill
from tests.support.openmemory import Database, Row, checksum, create_table, load, mismatches, pack, random_rows
from tests.support.roles import other, owner
from tests.support.server_engine import SERVER
from tests.support.sessions import converted, eventually, logged_statements
from tests.support.states import BACKFILL, EXPAND, HEAD, INDEX, nearest, stamp
from tests.support.writers import remembered, v_of, writing

__all__ = ["other", "owner"]  # fixtures

DIM = 8
# a plain server's table for one of Citus': what is asked of its shards has an answer here
SPREAD = """
from openmemory_migrations.backfill import reader
from openmemory_migrations.db import citus
citus.shards, citus.pages, citus.index_size = lambda *_: 1, lambda db, _: reader.pages_of(db), lambda *_: None
"""
TIMEOUT = {"OM_LOCK_TIMEOUT_MS": "321"}
NAN = pack([float("nan")] * DIM)
SEQUENTIAL = "SET LOCAL citus.multi_shard_modify_mode TO 'sequential'"
PROPAGATE = "SET LOCAL citus.propagate_set_commands TO 'local'"
ALLOW, REFUSE = (f"SET LOCAL citus.enable_unsafe_triggers TO {state}" for state in ("on", "off"))
DDL = re.compile(r"(CREATE|ALTER|DROP|COMMENT|REVOKE|GRANT|TRUNCATE)\b")
TRIGGER = re.compile(r"(CREATE (OR REPLACE )?|DROP |ALTER |ALTER TABLE .* ENABLE ALWAYS )TRIGGER\b")
OF_THE_TABLE = re.compile(rf"(CREATE (OR REPLACE )?|DROP |ALTER )(TRIGGER|TABLE)\b.*{TABLE}|DROP FUNCTION|COMMENT ON")
Transaction = list[str]


def transactions(statements: list[tuple[str, str]]) -> list[Transaction]:
    """The statements of each session by transaction; what is sent outside of one is one of its own."""
    found: list[Transaction] = []
    open_: dict[str, Transaction] = {}
    for pid, text in statements:
        if text.startswith("BEGIN"):
            found.append(open_.setdefault(pid, []))
        elif text in ("COMMIT", "ROLLBACK"):
            open_.pop(pid, None)
        elif pid in open_:
            open_[pid].append(text)
        else:
            found.append([text])
    return [transaction for transaction in found if transaction]


def bad_rows(number: int) -> list[Row]:
    return [row._replace(v=NAN) for row in random_rows(number, DIM, seed=1)]


@pytest.fixture(params=["superuser", "owner", "adopted column", "no trigger", "hnsw"])
def statements(request: pytest.FixtureRequest, database: Database) -> list[tuple[str, str]]:
    """Of the chain, in several situations; in each of them some rows can't be converted."""
    if request.param == "owner":
        by = request.getfixturevalue("owner")
        database.run("CREATE EXTENSION vector")
    else:
        by = database
        create_table(database)
        load(database, random_rows(300, DIM))
    load(database, bad_rows(5))
    if request.param == "adopted column":
        database.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector({DIM})")
        database.run(f"INSERT INTO {TABLE} SELECT gen_random_uuid(), 's', 'u', NULL, 8, '[1,2,3,4,5,6,7,8]'")
    env = {"no trigger": {"OM_SYNC_TRIGGER": "off"}, "hnsw": {"OM_INDEX": "hnsw"}}.get(request.param, {})
    with logged_statements(database) as found:
        for command in (("upgrade", "head"), ("downgrade", "base")):
            settings = SERVER | {"BACKFILL_BATCH": "50", "OM_ACCEPT_LOSS": "1"} | TIMEOUT | env
            done = result(start_alembic(by, *command, env=settings, patch=SPREAD))
            assert done.returncode == 0, done.log
    return found


def test_every_statement_keeps_the_rules_of_citus(statements: list[tuple[str, str]]) -> None:
    texts = [text for _, text in statements]
    changing = [t for t in transactions(statements) if any(OF_THE_TABLE.match(text) for text in t)]
    changing = [t for t in changing if not any("openmemory_alembic_version" in text for text in t)]
    assert len(changing) >= 2
    for transaction in changing:
        first = next(i for i, text in enumerate(transaction) if DDL.match(text))
        timeout = next(i for i, text in enumerate(transaction) if "SET LOCAL lock_timeout TO '321ms'" in text)
        assert transaction.index(SEQUENTIAL) < timeout < first, transaction
        assert transaction.index(PROPAGATE) < timeout, transaction
        # or it would not get to the nodes
        assert not any("set_config('lock_timeout'" in text for text in transaction[timeout:])

    # a batch
    updating = [t for t in transactions(statements) if any(text.startswith("UPDATE") and TABLE in text for text in t)]
    updating = [t for t in updating if any("openmemory_vectors_vvector_convert" in text for text in t)]
    assert updating
    for transaction in updating:
        timeout = next(i for i, text in enumerate(transaction) if text.startswith("SET LOCAL lock_timeout TO"))
        update = next(i for i, text in enumerate(transaction) if text.startswith("UPDATE"))
        assert transaction.index(PROPAGATE) < timeout < update, transaction
        # it looks only, in a column of its own, and no value of another row can get there
        assert not any(re.search(r"\b(JOIN|FROM (?!pg_|unnest))", text) for text in transaction if "UPDATE" in text)

    for transaction in transactions(statements):
        unsafe = [i for i, text in enumerate(transaction) if TRIGGER.match(text)]
        for i in unsafe:
            assert (transaction[i - 1], transaction[i + 1]) == (ALLOW, REFUSE), transaction
        assert transaction.count(ALLOW) == transaction.count(REFUSE) == len(unsafe), transaction

    indexes = [text for text in texts if re.match("CREATE (UNIQUE )?INDEX", text)]
    dropped = [text for text in texts if text.startswith("DROP INDEX")]
    assert len(indexes) == 1
    assert dropped
    for text in [text for text in texts if TRIGGER.match(text)] + indexes + dropped:
        assert ";" not in text.rstrip(";"), "not sent alone"
    for text in texts:
        assert not re.search(r";\s*(CREATE|DROP|ALTER) .*(TRIGGER|INDEX)", text), "not sent alone"
        assert not re.search(r"\bFOR (NO KEY )?(UPDATE|SHARE)\b|SKIP LOCKED", text), text
        assert not re.search(r"CREATE (UNIQUE )?INDEX .*IF NOT EXISTS", text), text
        assert not (text.startswith("DROP INDEX CONCURRENTLY") and "IF EXISTS" not in text), text
        assert not re.match(r"MERGE|ALTER TABLE .* SET STORAGE", text), text
        # a row's place names one in each shard, a range of places all rows of it in each
        assert not (text.startswith("UPDATE") and "ctid = " in text), text


# -- on Citus itself

URL = os.environ.get("OM_TEST_CITUS_URL")
ROWS, SHARDS = 2_000, 16


@pytest.mark.slow
def test_another_index_keeps_the_rules_of_citus(database: Database) -> None:
    create_table(database)
    load(database, random_rows(300, DIM))
    alembic(database, "upgrade", "head")

    with logged_statements(database) as found:
        assert om(database, "index", env={"OM_INDEX": "hnsw"} | TIMEOUT).returncode == 0

    texts = [text for _, text in found]
    (renaming,) = [t for t in transactions(found) if any(text.startswith("ALTER INDEX") for text in t)]
    first = next(i for i, text in enumerate(renaming) if text.startswith("ALTER INDEX"))
    timeout = renaming.index("SET LOCAL lock_timeout TO '321ms'")
    assert renaming.index(SEQUENTIAL) < renaming.index(PROPAGATE) < timeout < first
    assert [text.split("RENAME")[0] for text in renaming[first:]] == [
        f'ALTER INDEX "public"."{name}" ' for name in (INDEX, f"{INDEX}_new")
    ]
    assert [t for t in texts if t.startswith("CREATE INDEX") and "IF NOT EXISTS" not in t]
    assert all("IF EXISTS" in text for text in texts if text.startswith("DROP INDEX"))
    assert not any(";" in text.rstrip(";") for text in texts if DDL.match(text)), "not sent alone"


on_citus = [pytest.mark.citus, pytest.mark.skipif(not URL, reason="OM_TEST_CITUS_URL isn't set")]


@dataclass(frozen=True)
class Cluster:
    """A schema of its own in the coordinator's database, first in the search_path of every session."""

    database: Database
    schema: str
    shards: int

    @property
    def env(self) -> dict[str, str]:
        return {"OM_PG_SCHEMA": self.schema, "OM_VEC_DIM": str(DIM)}

    def alembic(self, *args: str, check: bool = True, **env: str) -> str:
        result = alembic(self.database, *args, env=self.env | env, check=check, timeout=280)
        assert check or result.returncode != 0, result.log
        assert "Traceback" not in result.log, result.log
        return result.log

    def mismatches(self) -> list[tuple[str, str]]:
        return mismatches(self.database, schema=self.schema, dim=DIM)

    def checksum(self) -> str:
        return checksum(self.database, schema=self.schema)

    def on_shards(self, sql: str) -> list[str]:
        """What `sql` gives on each shard; %s is its name, quoted."""
        rows = self.database.rows(
            "SELECT success, result FROM run_command_on_shards(%s::regclass, %s)", f"{self.schema}.{TABLE}", sql
        )
        assert all(success for success, _ in rows), rows
        return [result for _, result in rows]


def spread(database: Database, schema: str, kind: str) -> int:
    """Has Citus distribute the table, and returns its number of shards."""
    table = f"{schema}.{TABLE}"
    assert database.value("SELECT count(*) FROM pg_extension WHERE extname = 'citus'"), "there is no Citus at that URL"
    if kind == "reference":
        database.rows("SELECT create_reference_table(%s)", table)
        return 1
    database.rows(
        "SELECT create_distributed_table(%s, 'id', shard_count => %s, colocate_with => 'none')", table, SHARDS
    )
    return SHARDS


@pytest.fixture(params=["distributed", "reference"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The table, distributed and filled; a row can't be converted."""
    assert URL
    schema = f"om_{uuid.uuid4().hex[:12]}"
    asked = make_url(URL).set(drivername="postgresql")
    here = asked.update_query_dict({"options": f"-csearch_path={schema},public"})
    database = Database(asked.database or "", here.render_as_string(hide_password=False))
    database.run(SQL("CREATE SCHEMA {}").format(Identifier(schema)))
    try:
        create_table(database, schema=schema)
        shards = spread(database, schema, request.param)
        load(database, random_rows(ROWS, DIM) + bad_rows(1), schema=schema)
        yield Cluster(database, schema, shards)
    finally:
        database.run(SQL("DROP SCHEMA {} CASCADE").format(Identifier(schema)))


def plan(cluster: Cluster) -> str:
    """Of the five nearest rows, on the shards: they hear only what is set inside the transaction."""
    connection = psycopg2.connect(cluster.database.url)
    with connection.cursor() as cursor:
        cursor.execute(PROPAGATE)
        cursor.execute("SET LOCAL enable_seqscan TO off")
        cursor.execute(f"EXPLAIN (COSTS OFF) SELECT sector FROM {TABLE} {nearest(DIM)} LIMIT 5")
        lines = "\n".join(line for (line,) in cursor.fetchall())
    connection.close()
    return lines


def assert_at_head(cluster: Cluster) -> None:
    assert stamp(cluster.database, cluster.schema) == [HEAD]
    assert cluster.mismatches() == []
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = %s::regclass"
    assert cluster.database.value(valid, f"{cluster.schema}.{INDEX}") is True
    # on a shard the number of the shard follows the name
    assert re.search(rf"Index Scan using {INDEX}(_\d+)? on ", plan(cluster)), plan(cluster)


def assert_at_base(cluster: Cluster) -> None:
    assert stamp(cluster.database, cluster.schema) == []
    columns = "SELECT count(*) FROM pg_attribute WHERE attrelid = %s::regclass AND attname LIKE 'v\\_vector%%'"
    left = [
        cluster.database.value(columns, f"{cluster.schema}.{TABLE}"),
        cluster.database.value(
            "SELECT count(*) FROM pg_trigger WHERE tgrelid = %s::regclass AND NOT tgisinternal"
            " AND tgname LIKE 'openmemory%%'",
            f"{cluster.schema}.{TABLE}",
        ),
        cluster.database.value("SELECT count(*) FROM pg_proc WHERE pronamespace = %s::regnamespace", cluster.schema),
        cluster.database.value(
            "SELECT count(*) FROM pg_class WHERE relnamespace = %s::regnamespace"
            " AND relkind IN ('i', 'I') AND relname LIKE '%%vvector%%'",
            cluster.schema,
        ),
    ]
    assert left == [0, 0, 0, 0]


def assert_shards(cluster: Cluster, *, valid_indexes: int, columns: int, triggers: int) -> None:
    asked = {
        "SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam"
        " WHERE i.indrelid = '%s'::regclass AND a.amname = 'ivfflat' AND i.indisvalid": valid_indexes,
        "SELECT count(*) FROM pg_attribute WHERE attrelid = '%s'::regclass AND attname = 'v_vector'": columns,
        "SELECT count(*) FROM pg_trigger WHERE tgrelid = '%s'::regclass AND tgname ~ '^openmemory'": triggers,
    }
    for sql, wanted in asked.items():
        assert set(cluster.on_shards(sql)) == {str(wanted)}, sql


class TestOnCitus:
    pytestmark = on_citus

    def test_up_down_and_up_again(self, cluster: Cluster) -> None:
        v = cluster.checksum()
        for _ in range(2):
            log = cluster.alembic("upgrade", "head")

            assert f"backfill {TABLE}: {ROWS:,} of {ROWS + 1:,} rows" in log
            assert "1 rows of" in log
            assert "NaN or infinite values: 1 (such as (id=" in log
            assert_at_head(cluster)
            assert_shards(cluster, valid_indexes=1, columns=1, triggers=1)

            cluster.alembic("downgrade", "base")

            assert_at_base(cluster)
            assert_shards(cluster, valid_indexes=0, columns=0, triggers=0)
            assert cluster.checksum() == v

    def test_up_down_and_up_again_while_the_application_writes(self, cluster: Cluster) -> None:
        with writing(cluster.database, random_rows(ROWS, DIM)) as writers:
            for command in [("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")]:
                cluster.alembic(*command, BACKFILL_BATCH="100")

        assert_at_head(cluster)
        bad = {(row.id, row.sector): row.v for row in bad_rows(1)}
        assert v_of(cluster.database) == remembered(writers) | bad

    def test_a_killed_backfill_carries_on(self, cluster: Cluster) -> None:
        cluster.alembic("upgrade", EXPAND)
        process = start_alembic(cluster.database, "upgrade", "head", env=cluster.env | {"BACKFILL_BATCH": "10"})
        eventually(lambda: converted(cluster.database) > 0.2 * ROWS)
        kill(process)
        eventually(lambda: not _ours(cluster.database), 30)
        before = converted(cluster.database)
        assert before < ROWS

        log = cluster.alembic("upgrade", "head")

        assert f"backfill {TABLE}: {ROWS - before:,} of {ROWS - before + 1:,} rows" in log
        assert_at_head(cluster)

    def test_runs_beside_each_other_share_the_table(self, cluster: Cluster) -> None:
        cluster.alembic("upgrade", EXPAND)

        log = cluster.alembic("upgrade", "head", OM_BACKFILL_WORKERS="3", BACKFILL_BATCH="50")

        assert f"{ROWS:,} of {ROWS + 1:,} rows" in log
        assert_at_head(cluster)

    def test_without_the_trigger_the_function_is_made_on_every_node(self, cluster: Cluster) -> None:
        cluster.alembic("upgrade", "head", OM_SYNC_TRIGGER="off")
        assert_at_head(cluster)
        cluster.alembic("downgrade", "base", OM_SYNC_TRIGGER="off")
        assert_at_base(cluster)

    def test_a_lock_on_a_shard_is_waited_for_in_short_tries(self, cluster: Cluster) -> None:
        """Its timeout has to be known on the nodes."""
        cluster.alembic("upgrade", EXPAND)
        row = sorted(random_rows(ROWS, DIM))[ROWS // 2]
        holder = psycopg2.connect(cluster.database.url)
        with holder.cursor() as cursor:
            cursor.execute(f"UPDATE {TABLE} SET user_id = 'held' WHERE id = %s AND sector = %s", (row.id, row.sector))
            assert cursor.rowcount == 1
        process = start_alembic(cluster.database, "upgrade", BACKFILL, env=cluster.env | {"OM_LOCK_TIMEOUT_MS": "200"})
        eventually(lambda: converted(cluster.database) > 0.4 * ROWS or process.poll() is not None)
        holder.rollback()
        holder.close()
        out, err = process.communicate(timeout=120)

        assert process.returncode == 0, out + err
        assert "lock timeout" in err
        assert cluster.mismatches() == []

    @pytest.mark.timeout(120)
    def test_values_without_source_of_an_adopted_column_are_carried_over(self, cluster: Cluster) -> None:
        """A table's size on the coordinator is nought, and no place names one row."""
        cluster.database.run(f"ALTER TABLE {TABLE} ADD v_vector vector({DIM})")
        (row,) = random_rows(1, DIM, seed=2)
        cluster.database.run(
            f"INSERT INTO {TABLE} (id, sector, dim, v_vector) VALUES (%s, 'own', 8, '[1,2,3,4,5,6,7,8]')", row.id
        )

        cluster.alembic("upgrade", "head")

        kept = cluster.database.value(f"SELECT v_vector::text FROM {TABLE} WHERE sector = 'own'")
        assert kept == "[1,2,3,4,5,6,7,8]"

    def test_the_client_engine_is_refused(self, cluster: Cluster) -> None:
        cluster.alembic("upgrade", EXPAND)

        log = cluster.alembic("upgrade", "head", check=False, OM_BACKFILL_ENGINE="client")

        assert "is distributed by Citus, and OM_BACKFILL_ENGINE=client works on ordinary tables only" in log
        assert "HINT:  Leave OM_BACKFILL_ENGINE unset, or set it to server." in log
        assert stamp(cluster.database, cluster.schema) == [EXPAND]
        assert converted(cluster.database) == 0

    @pytest.mark.parametrize("start", ["base", EXPAND])
    def test_a_run_on_a_worker_is_refused(self, cluster: Cluster, start: str) -> None:
        workers = cluster.database.rows(
            "SELECT nodename, nodeport FROM pg_dist_node WHERE noderole = 'primary' AND groupid <> 0 AND hasmetadata"
        )
        if not workers:
            pytest.skip("a coordinator without workers")
        if start != "base":
            cluster.alembic("upgrade", start)
        (host, port), *_ = workers
        # a host in the query is libpq's too, and would win
        url = make_url(cluster.database.url)
        url = url.difference_update_query(["host", "port"]).set(host=host, port=port)
        worker = Database(cluster.database.name, url.render_as_string(hide_password=False))

        result = alembic(worker, "upgrade", "head", env=cluster.env, check=False)

        assert result.returncode != 0, result.log
        assert "Traceback" not in result.log
        assert "Connect to the coordinator and run" in result.log
        assert stamp(cluster.database, cluster.schema) == ([start] if start != "base" else None)


def _ours(database: Database) -> bool:
    sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'openmemory-migrations%%')"
    return bool(database.value(sql))
