"""Every option: where it is read from, what it may be, what it means.

`-x name=value` wins over the environment, the environment over the default. A field's name is the `-x` name; both come
from the variable. An empty value counts as unset, as OpenMemory itself reads its environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .errors import MigrationError

MAX_DIMENSIONS = 16_000  # pgvector's VECTOR_MAX_DIM
TIER_DIMENSIONS = {"fast": 256, "smart": 384, "deep": 1536, "hybrid": 256}  # OpenMemory's OM_TIER


@dataclass(frozen=True)
class Option:
    """How one variable is read: `parse` raises ValueError for what isn't allowed."""

    variable: str
    parse: Callable[[str], Any]
    allowed: str
    meaning: str

    @property
    def argument(self) -> str:
        return self.variable.removeprefix("OM_").lower()


def _option(variable: str, parse: tuple[Callable[[str], Any], str], default: Any, meaning: str, **kw: Any) -> Any:
    return field(default=default, metadata={"option": Option(variable, *parse, meaning)}, **kw)


def _whole(low: int, high: int) -> tuple[Callable[[str], int], str]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\s*\d+\s*", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return parse, f"a whole number from {low:,} to {high:,}"


def _choice(*values: str) -> tuple[Callable[[str], str], str]:
    def parse(text: str) -> str:
        if text.lower() not in values:
            raise ValueError
        return text.lower()

    return parse, ", ".join(values[:-1]) + " or " + values[-1]


def _switch() -> tuple[Callable[[str], bool], str]:
    def parse(text: str) -> bool:
        return {"on": True, "off": False}[text.lower()]

    return parse, "on or off"


def _text() -> tuple[Callable[[str], str], str]:
    def parse(text: str) -> str:
        text.encode()  # bytes that aren't UTF-8 arrive as lone surrogates, which no driver takes
        return text

    return parse, "any text"


def _identifier() -> tuple[Callable[[str], str], str]:
    def parse(text: str) -> str:
        if len(text.encode()) > 63 or "\0" in text:
            raise ValueError
        return text

    return parse, "a PostgreSQL identifier of at most 63 bytes, unquoted"


def _memory() -> tuple[Callable[[str], int], str]:
    def parse(text: str) -> int:
        found = re.fullmatch(r"\s*(\d+)\s*(kB|MB|GB)\s*", text, re.IGNORECASE)
        if not found:
            raise ValueError
        kilobytes = int(found[1]) * {"kb": 1, "mb": 1024, "gb": 1024**2}[found[2].lower()]
        if not 1024 <= kilobytes <= 2**31 - 1:  # the range of the server's maintenance_work_mem from 1 MB up
            raise ValueError
        return kilobytes

    return parse, "an amount from 1 MB, such as 512MB or 4GB"


def _url() -> tuple[Callable[[str], URL], str]:
    def parse(text: str) -> URL:
        text.encode()
        try:
            url = make_url(text)
        except (ArgumentError, ValueError) as error:
            raise ValueError from error
        if "@" in (url.host or ""):  # the rest of a password whose @ isn't written %40
            raise ValueError
        if url.get_backend_name() in ("postgres", "postgresql"):
            # by name: plain postgresql:// is psycopg2 in SQLAlchemy 2.0 and psycopg 3 in 2.1
            driver = url.drivername.partition("+")[2] or "psycopg2"
            return url.set(drivername=f"postgresql+{driver}")
        if url.get_backend_name() != "sqlite":
            raise ValueError
        return url

    return parse, "a postgresql://, postgres:// or sqlite:// URL, with @ and / in a password as %40 and %2F"


@dataclass(frozen=True)
class Settings:
    """One run's settings; dimensions, rows and milliseconds as the names say, memory in kilobytes."""

    database_url: URL | None = _option("OM_DATABASE_URL", _url(), None, "database; wins over OM_PG_*", repr=False)
    pg_host: str | None = _option("OM_PG_HOST", _text(), None, "host, or the directory of a unix socket")
    pg_port: int = _option("OM_PG_PORT", _whole(1, 65535), 5432, "port")
    pg_db: str = _option("OM_PG_DB", _text(), "openmemory", "database name")
    pg_user: str | None = _option("OM_PG_USER", _text(), None, "role")
    pg_password: str | None = _option("OM_PG_PASSWORD", _text(), None, "password", repr=False)
    pg_schema: str = _option("OM_PG_SCHEMA", _identifier(), "public", "schema of the table and the version table")
    pg_ssl: str = _option(
        "OM_PG_SSL",
        _choice("disable", "require", "verify-full"),
        "disable",
        "TLS: none, without verification, or verified",
    )
    pg_ssl_ca: str | None = _option("OM_PG_SSL_CA", _text(), None, "file with the CA for verify-full")
    metadata_backend: str | None = _option(
        "OM_METADATA_BACKEND", _choice("sqlite", "postgres"), None, "sqlite without a URL: nothing to do"
    )
    vector_table: str = _option("OM_VECTOR_TABLE", _identifier(), "openmemory_vectors", "the table")
    vec_dim: int | None = _option("OM_VEC_DIM", _whole(1, MAX_DIMENSIONS), None, "dimensions of the vectors")
    tier: str | None = _option(
        "OM_TIER",
        _choice(*TIER_DIMENSIONS),
        None,
        "dimensions by OpenMemory's tier: "
        + ", ".join(f"{name} {size}" for name, size in TIER_DIMENSIONS.items())
        + "; OM_VEC_DIM wins",
    )
    backfill_batch: int = _option(
        "BACKFILL_BATCH",
        _whole(1, 100_000),
        4000,
        "rows a batch and commit, also bounded to about 8 MiB, inside the server 32",
    )
    backfill_engine: str | None = _option(
        "OM_BACKFILL_ENGINE",
        _choice("client", "native", "server"),
        None,
        "what converts: the client, the server's own code (superusers only), or a function in the server; unset: the"
        " server's own code where it can be had, else the client; on Citus the server",
    )
    backfill_workers: int = _option(
        "OM_BACKFILL_WORKERS", _whole(1, 32), 1, "pairs of connections that convert side by side"
    )
    backfill_pause_ms: int = _option(
        "OM_BACKFILL_PAUSE_MS", _whole(0, 600_000), 0, "milliseconds of rest after each batch"
    )
    backfill_max_lag: int | None = _option(
        "OM_BACKFILL_MAX_LAG", _whole(1, 86_400), None, "seconds of replica lag above which the backfill waits"
    )
    stop_at_slot_lag: int | None = _option(
        "OM_STOP_AT_SLOT_LAG",
        _memory(),
        None,
        "WAL that a replication slot keeps, at which the backfill ends with exit code 3",
    )
    on_bad_rows: str = _option(
        "OM_ON_BAD_ROWS",
        _choice("skip", "fail"),
        "skip",
        "fail: convert the rest, then fail the revision; skip, if set: pass by what the server refuses too",
    )
    sync_trigger: bool = _option("OM_SYNC_TRIGGER", _switch(), True, "the trigger that keeps v_vector in step with v")
    index: str = _option("OM_INDEX", _choice("ivfflat", "hnsw", "none"), "ivfflat", "kind of vector index")
    index_metric: str = _option("OM_INDEX_METRIC", _choice("l2", "cosine", "ip"), "l2", "distance of the index")
    index_halfvec: bool = _option(
        "OM_INDEX_HALFVEC",
        _switch(),
        False,
        "index the cast to halfvec, half the size, for queries that cast too; above 2,000 dimensions always",
    )
    index_lists: int | None = _option("OM_INDEX_LISTS", _whole(1, 32_768), None, "ivfflat; unset: from the rows")
    index_m: int = _option("OM_INDEX_M", _whole(2, 100), 16, "hnsw: connections a layer")
    index_ef_construction: int = _option(
        "OM_INDEX_EF_CONSTRUCTION", _whole(4, 1000), 64, "hnsw: candidates at build, at least twice m"
    )
    index_memory: int | None = _option(
        "OM_INDEX_MEMORY",
        _memory(),
        None,
        "maintenance_work_mem of the index build; unset: what it needs, as far as the server has it",
    )
    lock_timeout_ms: int = _option(
        "OM_LOCK_TIMEOUT_MS", _whole(1, 600_000), 500, "milliseconds a try waits for a lock; 30 tries"
    )
    single_transaction: bool = _option(
        "OM_SINGLE_TRANSACTION", _switch(), False, "with --sql: no COMMIT and no CONCURRENTLY in the script"
    )
    accept_loss: int = _option(
        "OM_ACCEPT_LOSS",
        _whole(0, 2**63 - 1),
        0,
        "number of values that a downgrade may lose, or of rows that may leave the table at a cutover",
    )
    cutover: str | None = _option(
        "OM_CUTOVER",
        _choice("swap", "drop"),
        None,
        "what the cutover does: swap makes v_vector v and keeps the bytes as v_bytea, drop takes v away",
    )
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)  # names of those that were set

    def __post_init__(self) -> None:
        if self.index_ef_construction < 2 * self.index_m:
            raise MigrationError(
                f"OM_INDEX_EF_CONSTRUCTION is {self.index_ef_construction}, less than twice OM_INDEX_M"
                f" ({self.index_m})",
                hint=f"Set OM_INDEX_EF_CONSTRUCTION to at least {2 * self.index_m}.",
            )
        if self.pg_ssl == "verify-full" and self.pg_ssl_ca and not os.path.isfile(self.pg_ssl_ca):
            raise MigrationError(
                f'OM_PG_SSL_CA names "{self.pg_ssl_ca}", which is not a file',
                hint="Set OM_PG_SSL_CA to a file with the CA's certificate in PEM form, or leave it unset.",
            )

    @property
    def dimensions(self) -> int | None:
        """The configured dimensions, or None: then the rows decide."""
        return self.vec_dim or (TIER_DIMENSIONS[self.tier] if self.tier else None)

    @property
    def native(self) -> Settings:
        """The same for a `v` that is a vector: the index that newer OpenMemory makes, unless told otherwise."""
        return dataclasses.replace(
            self,
            index=self.index if "index" in self.given else "hnsw",
            index_metric=self.index_metric if "index_metric" in self.given else "cosine",
        )

    @classmethod
    def load(cls, arguments: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings from `arguments` (-x names) over `environ` (default: this process's) over the defaults.

        Raises MigrationError for the first value that isn't allowed. Names in `arguments` that aren't ours are left
        alone: a host application has -x arguments of its own.
        """
        arguments = arguments or {}
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for name, option in OPTIONS.items():
            for source, raw in (
                (f"-x {name}", arguments.get(name)),
                (option.variable, environ.get(option.variable)),
            ):
                if raw is not None and raw != "":
                    values[name] = _read(option, source, raw)
                    break
        return cls(**values, given=frozenset(values))


def _read(option: Option, source: str, raw: Any) -> Any:
    text = ("on" if raw else "off") if isinstance(raw, bool) else str(raw)
    try:
        return option.parse(text)
    except (ValueError, KeyError):
        # what was given may be, or hold, a password
        shown = "" if option.variable in ("OM_DATABASE_URL", "OM_PG_PASSWORD") else f' "{text}"'
        raise MigrationError(
            f"invalid value{shown} for {option.variable}" + (f" (from {source})" if "-x" in source else ""),
            hint=f"{option.variable} must be {option.allowed}.",
        ) from None


OPTIONS: dict[str, Option] = {
    f.name: f.metadata["option"] for f in dataclasses.fields(Settings) if "option" in f.metadata
}


def refuse_unknown(arguments: Mapping[str, str]) -> None:
    """Raises MigrationError for an -x name that isn't ours: a typing error must not be a silent default."""
    for name in arguments:
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            raise MigrationError(
                f'unknown setting "{name}" after -x',
                hint=f'Did you mean "{close[0]}"?' if close else "Allowed: " + ", ".join(OPTIONS) + ".",
            )
