"""Settings: where each option is read from, what it may be, and that a wrong one stops before anything is connected."""

from __future__ import annotations

import dataclasses
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from openmemory_migrations import settings
from openmemory_migrations.errors import MigrationError
from openmemory_migrations.settings import OPTIONS, Settings
from tests.support.commands import alembic

SECRET = "pa55-of-mine"

# option -> something allowed that isn't the default, and what it is then
RIGHT: dict[str, tuple[str, Any]] = {
    "database_url": ("postgres://u:p@h/d", make_url("postgresql+psycopg2://u:p@h/d")),
    "pg_host": ("db.example", "db.example"),
    "pg_port": ("6543", 6543),
    "pg_db": ("memory", "memory"),
    "pg_user": ("om", "om"),
    "pg_password": (" p w ", " p w "),
    "pg_schema": ("Om-Test", "Om-Test"),
    "pg_ssl": ("Require", "require"),
    "pg_ssl_ca": ("/some/ca.pem", "/some/ca.pem"),
    "metadata_backend": ("SQLite", "sqlite"),
    "vector_table": ("select", "select"),
    "vec_dim": ("16000", 16_000),
    "tier": ("smart", "smart"),
    "backfill_batch": (" 500 ", 500),
    "backfill_engine": ("Server", "server"),
    "backfill_workers": ("3", 3),
    "backfill_pause_ms": ("250", 250),
    "backfill_max_lag": ("30", 30),
    "stop_at_slot_lag": ("10GB", 10 * 1024**2),
    "on_bad_rows": ("fail", "fail"),
    "sync_trigger": ("OFF", False),
    "single_transaction": ("ON", True),
    "index": ("hnsw", "hnsw"),
    "index_metric": ("cosine", "cosine"),
    "index_halfvec": ("On", True),
    "index_lists": ("32768", 32_768),
    "index_m": ("32", 32),
    "index_ef_construction": ("1000", 1000),
    "index_memory": ("2 gb", 2 * 1024**2),
    "lock_timeout_ms": ("1", 1),
    "accept_loss": ("9223372036854775807", 2**63 - 1),
    "cutover": ("Swap", "swap"),
}
NUMBERS = ["x", "-1", "1.5", "1e3", "+1", "0x10", "1_000", "1 000", "²", "9" * 5000]
WRONG: dict[str, tuple[list[str], str]] = {
    "database_url": (
        [SECRET, f"mysql://u:{SECRET}@h/d", f"postgresql://u:{SECRET}@h:port/d", f"http://h/{SECRET}", f"://{SECRET}"],
        "a postgresql://, postgres:// or sqlite:// URL",
    ),
    "pg_port": ([*NUMBERS, "0", "65536"], "a whole number from 1 to 65,535"),
    "pg_schema": (["x" * 64, "é" * 32, "nul\0"], "a PostgreSQL identifier of at most 63 bytes"),
    "pg_ssl": (["on", "prefer", "verify-ca", "verify_full"], "disable, require or verify-full"),
    "metadata_backend": (["mysql", "postgresql"], "sqlite or postgres"),
    "vector_table": (["x" * 64, "漢" * 22, "nul\0"], "a PostgreSQL identifier of at most 63 bytes"),
    "vec_dim": ([*NUMBERS, "0", "16001"], "a whole number from 1 to 16,000"),
    "tier": (["slow", "256"], "fast, smart, deep or hybrid"),
    "backfill_batch": ([*NUMBERS, "0", "100001"], "a whole number from 1 to 100,000"),
    "backfill_engine": (["auto", "python"], "client, native or server"),
    "backfill_workers": ([*NUMBERS, "0", "33"], "a whole number from 1 to 32"),
    "backfill_pause_ms": ([*NUMBERS, "600001"], "a whole number from 0 to 600,000"),
    "backfill_max_lag": ([*NUMBERS, "0", "86401"], "a whole number from 1 to 86,400"),
    "on_bad_rows": (["ignore", "on"], "skip or fail"),
    "sync_trigger": (["1", "true", "yes"], "on or off"),
    "single_transaction": (["1", "true", "yes"], "on or off"),
    "index": (["off", "btree", "ivf"], "ivfflat, hnsw or none"),
    "index_metric": (["L1", "<->", "euclid"], "l2, cosine or ip"),
    "index_halfvec": (["1", "true", "half"], "on or off"),
    "index_lists": ([*NUMBERS, "0", "32769"], "a whole number from 1 to 32,768"),
    "index_m": ([*NUMBERS, "1", "101"], "a whole number from 2 to 100"),
    "index_ef_construction": ([*NUMBERS, "3", "1001"], "a whole number from 4 to 1,000"),
    "index_memory": (
        ["x", "512", "MB", "0MB", "1023kB", "-1MB", "1.5GB", "1TB", "1 M B", "4096GB"],
        "an amount from 1 MB, such as 512MB or 4GB",
    ),
    "stop_at_slot_lag": (["10", "0MB", "1.5GB"], "an amount from 1 MB, such as 512MB or 4GB"),
    "lock_timeout_ms": ([*NUMBERS, "0", "600001"], "a whole number from 1 to 600,000"),
    "accept_loss": ([*NUMBERS, "9223372036854775808"], "a whole number from 0 to 9,223,372,036,854,775,807"),
    "cutover": (["on", "archive", "swap drop"], "swap or drop"),
}
ANY_TEXT = {"pg_host", "pg_db", "pg_user", "pg_password", "pg_ssl_ca"}
each_wrong_value = pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        pytest.param(name, value, allowed, id=f"{name}-{number}")
        for name, (values, allowed) in WRONG.items()
        for number, value in enumerate(values)
    ],
)


def loaded(arguments: dict[str, str] | None = None, /, **environ: str) -> Settings:
    return Settings.load(arguments, environ)


def variable(name: str) -> str:
    return OPTIONS[name].variable


def test_every_option_is_tested_here() -> None:
    assert set(RIGHT) == set(OPTIONS)
    assert set(WRONG) | ANY_TEXT == set(OPTIONS)
    assert not set(WRONG) & ANY_TEXT


def test_the_x_name_is_the_variables_without_om_in_lower_case() -> None:
    derived = {name: option.variable.removeprefix("OM_").lower() for name, option in OPTIONS.items()}

    assert derived == {name: name for name in OPTIONS}
    assert {name: option.argument for name, option in OPTIONS.items()} == derived
    assert {option.variable for option in OPTIONS.values()} >= {
        *("OM_DATABASE_URL", "OM_PG_HOST", "OM_PG_PORT", "OM_PG_DB", "OM_PG_USER", "OM_PG_PASSWORD", "OM_PG_SCHEMA"),
        *("OM_PG_SSL", "OM_PG_SSL_CA", "OM_METADATA_BACKEND", "OM_VECTOR_TABLE", "OM_VEC_DIM", "OM_TIER"),
        *(
            "BACKFILL_BATCH",
            "OM_BACKFILL_WORKERS",
            "OM_BACKFILL_PAUSE_MS",
            "OM_BACKFILL_MAX_LAG",
            "OM_ON_BAD_ROWS",
            "OM_SYNC_TRIGGER",
            "OM_INDEX",
            "OM_INDEX_METRIC",
            "OM_INDEX_LISTS",
        ),
        *("OM_INDEX_M", "OM_INDEX_EF_CONSTRUCTION", "OM_INDEX_MEMORY", "OM_LOCK_TIMEOUT_MS", "OM_ACCEPT_LOSS"),
    }


def test_nothing_set_gives_the_documented_defaults() -> None:
    assert dataclasses.asdict(loaded()) == {
        **dict.fromkeys(OPTIONS),
        "pg_port": 5432,
        "pg_db": "openmemory",
        "pg_schema": "public",
        "pg_ssl": "disable",
        "vector_table": "openmemory_vectors",
        "backfill_batch": 4000,
        "backfill_workers": 1,
        "backfill_pause_ms": 0,
        "on_bad_rows": "skip",
        "sync_trigger": True,
        "single_transaction": False,
        "index": "ivfflat",
        "index_metric": "l2",
        "index_halfvec": False,
        "index_m": 16,
        "index_ef_construction": 64,
        "lock_timeout_ms": 500,
        "accept_loss": 0,
        "given": frozenset(),
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_is_read_from_its_variable_and_its_x_name(name: str) -> None:
    text, value = RIGHT[name]

    assert getattr(Settings(), name) != value
    for read in (loaded({name: text}), loaded(**{variable(name): text})):
        assert read == dataclasses.replace(Settings(), **{name: value})
        assert type(getattr(read, name)) is type(value)


@pytest.mark.parametrize("name", OPTIONS)
def test_x_wins_over_the_environment_and_empty_counts_as_unset(name: str) -> None:
    text, value = RIGHT[name]
    # whatever the variable says is not even looked at
    other = WRONG[name][0][0] if name in WRONG else "other"

    assert getattr(loaded({name: text}, **{variable(name): other}), name) == value
    assert getattr(loaded({name: ""}, **{variable(name): text}), name) == value
    assert loaded({name: ""}, **{variable(name): ""}) == Settings()


def test_the_environment_is_the_process_own_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OM_VECTOR_TABLE", "vectors")

    assert Settings.load().vector_table == "vectors"
    assert Settings.load({}, {}).vector_table == "openmemory_vectors"


@each_wrong_value
@pytest.mark.parametrize("after_x", [False, True])
def test_a_wrong_value_is_one_error_with_variable_value_and_what_is_allowed(
    name: str, value: str, allowed: str, after_x: bool
) -> None:
    with pytest.raises(MigrationError) as raised:
        loaded({name: value}) if after_x else loaded(**{variable(name): value})

    first, hint = str(raised.value).splitlines()
    assert first.startswith("invalid value")
    assert f"for {variable(name)}" in first
    assert (f"-x {name}" in first) is after_x
    assert hint.startswith(f"HINT:  {variable(name)} must be {allowed}")
    if name == "database_url":
        assert SECRET not in str(raised.value)
    else:
        assert f'"{value}"' in first
    # nor behind it, in a traceback
    assert raised.value.__suppress_context__
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("name", sorted(ANY_TEXT))
def test_text_is_taken_as_it_is(name: str) -> None:
    text = " a'b\"c%d@e:f/g#h\\i{j}é "

    assert getattr(loaded(**{variable(name): text}), name) == text


@pytest.mark.parametrize("text", ["x" * 63, "é" * 31 + "x", 'a"b', "a.b", "50%", " :x", "{x}", "$x$", "\\"])
def test_any_name_of_63_bytes_is_an_identifier(text: str) -> None:
    assert loaded(OM_PG_SCHEMA=text, OM_VECTOR_TABLE=text).vector_table == text


@pytest.mark.parametrize(
    ("text", "kilobytes"),
    [("1MB", 1024), ("1024kB", 1024), ("512MB", 524_288), (" 4 GB ", 4_194_304), ("2047GB", 2047 * 1024**2)],
)
def test_memory_is_kept_in_kilobytes(text: str, kilobytes: int) -> None:
    assert loaded(OM_INDEX_MEMORY=text).index_memory == kilobytes


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OM_TIER": "fast"}, 256),
        ({"OM_TIER": "smart"}, 384),
        ({"OM_TIER": "deep"}, 1536),
        ({"OM_TIER": "HYBRID"}, 256),
        ({"OM_VEC_DIM": "768"}, 768),
        ({"OM_VEC_DIM": "768", "OM_TIER": "deep"}, 768),
        ({"OM_VEC_DIM": "", "OM_TIER": "deep"}, 1536),
    ],
)
def test_dimensions_are_vec_dim_else_the_tiers(environ: dict[str, str], expected: int | None) -> None:
    assert loaded(**environ).dimensions == expected


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgres://h/d", "postgresql+psycopg2"),
        ("postgresql://h/d", "postgresql+psycopg2"),
        ("postgres+psycopg2://h/d", "postgresql+psycopg2"),
        ("postgresql+psycopg2://h/d", "postgresql+psycopg2"),
        ("postgresql+asyncpg://h/d", "postgresql+asyncpg"),
        ("sqlite://", "sqlite"),
        ("sqlite:///file.db", "sqlite"),
    ],
)
def test_postgres_urls_name_psycopg2_unless_they_name_a_driver(url: str, driver: str) -> None:
    found = loaded(OM_DATABASE_URL=url).database_url

    assert found is not None
    assert found.drivername == driver
    assert found.set(drivername="x") == make_url(url).set(drivername="x")


def test_ef_construction_below_twice_m_is_refused_with_what_would_do() -> None:
    with pytest.raises(MigrationError) as raised:
        loaded(OM_INDEX_M="40")

    assert str(raised.value) == (
        "OM_INDEX_EF_CONSTRUCTION is 64, less than twice OM_INDEX_M (40)\n"
        "HINT:  Set OM_INDEX_EF_CONSTRUCTION to at least 80."
    )
    assert loaded(OM_INDEX_M="40", OM_INDEX_EF_CONSTRUCTION="80").index_m == 40


def test_a_ca_that_is_no_file_is_refused_where_it_would_be_used(tmp_path: Path) -> None:
    missing, ca = str(tmp_path / "missing.pem"), tmp_path / "ca.pem"
    ca.touch()
    for path in (missing, str(tmp_path)):
        with pytest.raises(MigrationError, match=f'OM_PG_SSL_CA names "{path}", which is not a file\nHINT: '):
            loaded(OM_PG_SSL="verify-full", OM_PG_SSL_CA=path)

    assert loaded(OM_PG_SSL="verify-full", OM_PG_SSL_CA=str(ca)).pg_ssl_ca == str(ca)
    assert loaded(OM_PG_SSL="require", OM_PG_SSL_CA=missing).pg_ssl_ca == missing


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vec_dims", 'Did you mean "vec_dim"?'),
        ("OM_INDEX", "Allowed: "),
        ("batch", "Allowed: "),
        ("index-lists", 'Did you mean "index_lists"?'),
        ("vector_tabel", 'Did you mean "vector_table"?'),
    ],
)
def test_an_unknown_x_name_is_refused_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(MigrationError) as raised:
        settings.refuse_unknown({"index": "none", name: "1"})

    first, second = str(raised.value).splitlines()
    assert first == f'unknown setting "{name}" after -x'
    assert second.startswith(f"HINT:  {hint}")
    if hint == "Allowed: ":
        assert [known for known in OPTIONS if known not in second] == []


def test_known_x_names_are_let_through_and_foreign_ones_are_the_hosts_own() -> None:
    settings.refuse_unknown(dict.fromkeys(OPTIONS, "1"))

    assert loaded({"tenant": "acme"}) == Settings()


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded().index = "none"  # type: ignore[misc]


def test_password_and_url_are_not_in_the_repr() -> None:
    shown = repr(loaded(OM_DATABASE_URL=f"postgresql://om:{SECRET}@h/d", OM_PG_PASSWORD=SECRET, OM_PG_USER="om"))

    assert SECRET not in shown
    assert "***" not in shown
    assert "pg_user='om'" in shown


# -- through the real command


@pytest.fixture
def dead_end() -> Iterator[str]:
    """A URL at which nothing answers: whoever connects to it gets an error of another kind."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        yield f"postgresql://om:{SECRET}@127.0.0.1:{taken.getsockname()[1]}/om"


def refused(*args: str, **env: str) -> list[str]:
    """The lines of Alembic's FAILED message."""
    result = alembic(None, *args, env=env, check=False)
    assert result.returncode != 0
    assert "Traceback" not in result.log
    assert SECRET not in result.log
    _, _, message = result.log.partition("FAILED: ")
    return message.splitlines()


@pytest.mark.parametrize(
    ("arguments", "env", "first"),
    [
        pytest.param([], {"OM_INDEX": "btree"}, 'invalid value "btree" for OM_INDEX', id="environment"),
        pytest.param(
            ["-x", "vec_dim=many"],
            {"OM_VEC_DIM": "256"},
            'invalid value "many" for OM_VEC_DIM (from -x vec_dim)',
            id="-x",
        ),
        pytest.param(["-x", "vecdim=256"], {}, 'unknown setting "vecdim" after -x', id="unknown -x"),
        pytest.param(
            [], {"OM_INDEX_M": "99"}, "OM_INDEX_EF_CONSTRUCTION is 64, less than twice OM_INDEX_M (99)", id="pair"
        ),
    ],
)
def test_the_command_stops_at_a_wrong_value_before_it_connects(
    dead_end: str, arguments: list[str], env: dict[str, str], first: str
) -> None:
    lines = refused(*arguments, "upgrade", "head", OM_DATABASE_URL=dead_end, **env)

    assert lines[0] == first
    assert lines[1].startswith("HINT:  ")


def test_the_dead_end_is_one(dead_end: str) -> None:
    lines = refused("upgrade", "head", OM_DATABASE_URL=dead_end)

    assert "Connection refused" in lines[0]


@pytest.mark.parametrize("command", [["upgrade", "head"], ["downgrade", "base"], ["current"]], ids=lambda args: args[0])
def test_without_a_database_the_command_names_both_ways_and_makes_nothing(tmp_path: Path, command: list[str]) -> None:
    # an embedded server would be in TMPDIR, libpq's own default is the user's name on a local socket
    lines = refused(*command, HOME=str(tmp_path), TMPDIR=str(tmp_path), OM_PG_DB="om", OM_PG_PASSWORD=SECRET)

    assert lines[0] == "no database is configured"
    assert "OM_DATABASE_URL" in lines[1]
    assert "OM_PG_HOST" in lines[1]
    assert list(tmp_path.iterdir()) == []


def test_sqlite_as_backend_without_a_url_is_one_notice_and_success(tmp_path: Path, dead_end: str) -> None:
    port = str(make_url(dead_end).port)
    env = {"OM_METADATA_BACKEND": "sqlite", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    for more in ({}, {"OM_PG_HOST": "127.0.0.1", "OM_PG_PORT": port}):
        result = alembic(None, "upgrade", "head", env=env | more)

        (line,) = result.log.splitlines()
        assert line.startswith("NOTICE:  OM_METADATA_BACKEND is sqlite")
        assert list(tmp_path.iterdir()) == []


def test_a_url_wins_over_sqlite_as_backend(dead_end: str) -> None:
    lines = refused("upgrade", "head", OM_DATABASE_URL=dead_end, OM_METADATA_BACKEND="sqlite")

    assert "Connection refused" in lines[0]


def test_on_sqlite_each_revision_is_one_notice_and_a_stamp_both_ways(tmp_path: Path) -> None:
    file = tmp_path / "openmemory.db"
    url = {"OM_DATABASE_URL": f"sqlite:///{file}"}

    def notices(*args: str) -> list[str]:
        lines = alembic(None, *args, env=url).log.splitlines()
        return [line for line in lines if line.startswith(("NOTICE", "WARNING"))]

    def stamp() -> list[tuple[str]]:
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [
                ("openmemory_alembic_version",)
            ]
            return connection.execute("SELECT version_num FROM openmemory_alembic_version").fetchall()

    up = notices("upgrade", "head")
    assert [line.split()[1] for line in up] == ["expand:", "backfill:", "finalize:"]
    assert all("nothing to do" in line for line in up)
    assert stamp() == [("om_20240108_finalize",)]
    assert notices("upgrade", "head") == []

    assert len(notices("downgrade", "base")) == 3
    assert stamp() == []


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        (f"postgresql+asyncpg://om:{SECRET}@127.0.0.1:1/om", "asyncpg"),
        (f"postgresql+nonsense://om:{SECRET}@127.0.0.1:1/om", "nonsense"),
        ("sqlite+aiosqlite:///{tmp_path}/openmemory.db", "aiosqlite"),
    ],
)
def test_a_driver_that_is_not_supported_is_named(tmp_path: Path, url: str, driver: str) -> None:
    lines = refused("upgrade", "head", OM_DATABASE_URL=url.replace("{tmp_path}", str(tmp_path)))

    assert lines[0] == f'driver "{driver}" is not supported'
    assert list(tmp_path.iterdir()) == []


def test_sql_output_is_refused_in_words(dead_end: str) -> None:
    for env in ({}, {"OM_DATABASE_URL": dead_end}):
        lines = refused("upgrade", "head", "--sql", **env)

        assert "--sql" in lines[0]
        assert lines[1].startswith("HINT:  ")


def test_a_variable_of_another_encoding_is_refused_as_any_wrong_value(dead_end: str) -> None:
    lines = refused("upgrade", "head", OM_DATABASE_URL=dead_end, OM_VECTOR_TABLE=os.fsdecode(b"caf\xe9"))

    assert "OM_VECTOR_TABLE" in lines[0]
