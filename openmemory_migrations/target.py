"""What is migrated, and what our objects beside it are called. Pure: names only, nothing is looked up."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from sqlalchemy.dialects import postgresql

from .settings import Settings

# a paramstyle without percent signs, or the preparer would double those of an identifier
_preparer = postgresql.dialect(paramstyle="named").identifier_preparer  # type: ignore[no-untyped-call]

OWN_COMMENT = "openmemory_migrations: kept equal to "  # on a column of ours; what has it not is adopted


def quote(identifier: str) -> str:
    return _preparer.quote_identifier(identifier)


def literal(text: str) -> str:
    """A string constant, for the few statements that take no parameters (COMMENT ON, a function's body)."""
    return "'" + text.replace("'", "''") + "'"


def derived(table: str, suffix: str) -> str:
    """`<table><suffix>`, cut and hashed where PostgreSQL would cut it at 63 bytes and two tables could collide."""
    if len((table + suffix).encode()) <= 63:
        return table + suffix
    digest = "_" + hashlib.sha256(table.encode()).hexdigest()[:8]
    room = 63 - len((digest + suffix).encode())
    return table.encode()[:room].decode(errors="ignore") + digest + suffix


@dataclass(frozen=True)
class Target:
    """The table, its column of bytes and its column of vectors."""

    schema: str
    table: str
    source: str = "v"
    vector: str = "v_vector"

    @classmethod
    def of(cls, settings: Settings) -> Target:
        return cls(settings.pg_schema, settings.vector_table)

    def __str__(self) -> str:
        return f'"{self.schema}.{self.table}"'

    @property
    def adopted(self) -> str:
        return derived(self.vector, "_adopted")

    @property
    def index(self) -> str:
        return derived(self.table, "_vvector_idx")

    @property
    def mirrored_index(self) -> str:
        """The second name, under which OpenMemory's finalize SQL makes a duplicate."""
        return derived(self.table, "_vvector_ivfflat_idx")

    @property
    def sync(self) -> str:
        """Trigger and its function."""
        return derived(self.table, "_vvector_sync")

    @property
    def comment(self) -> str:
        return OWN_COMMENT + self.source

    def names(self) -> dict[str, str]:
        """Quoted names for the `{…}` of every SQL text."""
        return {
            "schema": quote(self.schema),
            "table": f"{quote(self.schema)}.{quote(self.table)}",
            "source": quote(self.source),
            "vector": quote(self.vector),
            "adopted": quote(self.adopted),
            "sync": quote(self.sync),
            "sync_function": f"{quote(self.schema)}.{quote(self.sync)}",
            "convert": f"{quote(self.schema)}.{quote('openmemory_bytea_to_vector')}",
            "comment": literal(self.comment),
        }
