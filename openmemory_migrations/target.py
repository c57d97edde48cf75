"""What is migrated, and what our objects beside it are called. Pure: names only, nothing is looked up."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from .marks import INDEX, OWN
from .settings import Settings
from .sql import SQL, literal, quote

# Alembic's own, in OM_PG_SCHEMA: of the chain, and of the cutover
VERSION_TABLE, CUTOVER_VERSION_TABLE = "openmemory_alembic_version", "openmemory_cutover_version"
NEWER_INDEX = "openmemory_vectors_hnsw_idx"  # which newer OpenMemory looks for, whatever the table is called


def derived(name: str, suffix: str) -> str:
    """`<name><suffix>`, cut and hashed where PostgreSQL would cut it at 63 bytes and two names could collide."""
    whole = name + suffix
    if len(whole.encode()) <= 63:
        return whole
    digest = "_" + hashlib.sha256(name.encode()).hexdigest()[:8]
    room = 63 - len((digest + suffix).encode())
    if room < 8:  # a suffix as long as that is hashed as well
        return whole.encode()[:54].decode(errors="ignore") + "_" + hashlib.sha256(whole.encode()).hexdigest()[:8]
    return name.encode()[:room].decode(errors="ignore") + digest + suffix


@dataclass(frozen=True)
class Trigger:
    """`kind` is what a `Target` calls it. Names may be others than ours would be: a table gets another name, and what
    is on it keeps its own."""

    kind: str
    name: str
    function: tuple[str, str]  # schema, name


@dataclass(frozen=True)
class Target:
    """The table, its column of bytes and its column of vectors."""

    schema: str
    table: str
    source: str = "v"
    vector: str = "v_vector"
    suffix: str = ""  # of the index's name, as long as another index serves searches under the name without it
    index_name: str | None = None  # instead of one by table and column
    triggers: tuple[Trigger, ...] = ()  # that the table has of ours, as they are called now

    @classmethod
    def of(cls, settings: Settings) -> Target:
        return cls(settings.pg_schema, settings.vector_table)

    def __str__(self) -> str:
        return f'"{self.schema}.{self.table}"'

    @property
    def adopted(self) -> str:
        return derived(self.vector, "_adopted")

    def _trigger(self, kind: str, name: str) -> str:
        return next((found.name for found in self.triggers if found.kind == kind), name)

    def _function(self, kind: str, name: str) -> SQL:
        of = next((found.function for found in self.triggers if found.kind == kind), (self.schema, name))
        return quote(*of)

    def _own(self, suffix: str) -> str:
        """The name that OpenMemory's SQL gives, or one by the column: a host's table may have several."""
        kind = "_vvector" if self.vector == "v_vector" else f"_{self.vector}"
        return derived(self.table, kind + suffix)

    @property
    def archive(self) -> str:
        """The column of bytes beside vectors in whose place they were, or are to be again."""
        return derived(self.source, "_bytea")

    @property
    def swapped(self) -> Target:
        """The same after a swap: vectors in the place of the bytes."""
        return replace(self, source=self.archive, vector=self.source)

    @property
    def dropped(self) -> Target:
        """The same after a drop: bytes, if there are any, beside the vectors."""
        return replace(self, source=self.archive)

    @property
    def newer(self) -> Target:
        """The same with the index that newer OpenMemory makes on its `v`."""
        return replace(self, index_name=NEWER_INDEX if self.source in ("v", "v_bytea") else None)

    @property
    def native(self) -> Target:
        """The same where the column of bytes isn't one, but holds vectors itself."""
        return replace(self, vector=self.source).newer

    @property
    def typed(self) -> str:
        """The column, with dimensions, that is to take the place of vectors without."""
        return derived(self.source, "_typed")

    @property
    def typing(self) -> str:
        """Trigger, and its function, that keeps it equal to them."""
        return self._trigger("typing", derived(self.table, f"_{self.typed}_sync"))

    @property
    def index_comment(self) -> str:
        return INDEX + self.vector

    @property
    def index(self) -> str:
        return derived(self.index_name, self.suffix) if self.index_name else self._own("_idx" + self.suffix)

    @property
    def mirrored_index(self) -> str:
        """The second name, under which OpenMemory's finalize SQL makes a duplicate."""
        return self.index if self.index_name else self._own("_ivfflat_idx" + self.suffix)

    @property
    def new(self) -> Target:
        """The same, with the name of an index that is to take the place of another."""
        return replace(self, suffix="_new")

    @property
    def old(self) -> Target:
        """The same, with the name of an index whose place another has taken."""
        return replace(self, suffix="_old")

    @property
    def indexes(self) -> tuple[str, ...]:
        """Every name that an index of ours may have."""
        return self.index, self.mirrored_index, self.new.index, self.old.index

    @property
    def sync(self) -> str:
        """Trigger and its function."""
        return self._trigger("sync", self._own("_sync"))

    @property
    def convert(self) -> str:
        """The function that converts on the nodes of Citus; anywhere else a run has one of its own."""
        return self._own("_convert")

    @property
    def back(self) -> str:
        """Trigger, and its function, that keeps the bytes beside vectors in step with them."""
        return self._trigger("back", derived(self.table, f"_{self.archive}_sync"))

    @property
    def kept(self) -> str:
        """The table that keeps bytes which no vector can hold."""
        return derived(self.table, f"_{self.source}_kept")

    @property
    def left(self) -> str:
        """The index, and the constraint, that a cutover has for the time until its switch."""
        return self._own("_left")

    @property
    def guard(self) -> str:
        """Trigger, and its function, that refuses writes while a step is about to change the table."""
        return self._own("_guard")

    @property
    def comment(self) -> str:
        return OWN + self.source

    @property
    def detection(self) -> str:
        """What an application should ask to find the column; the answer is vector."""
        where = {"table_schema": self.schema, "table_name": self.table, "column_name": self.vector}
        return "SELECT udt_name FROM information_schema.columns WHERE " + " AND ".join(
            f"{column} = {literal(name)}" for column, name in where.items()
        )

    def names(self) -> dict[str, SQL]:
        """Quoted names for the `{…}` of every SQL text."""

        def within(name: str) -> SQL:
            return quote(self.schema, name)

        return {
            "schema": quote(self.schema),
            "table": within(self.table),
            "source": quote(self.source),
            "vector": quote(self.vector),
            "adopted": quote(self.adopted),
            "sync": quote(self.sync),
            "sync_function": self._function("sync", self.sync),
            "archive": quote(self.archive),
            "typed": quote(self.typed),
            "typing": quote(self.typing),
            "typing_function": self._function("typing", self.typing),
            "back": quote(self.back),
            "back_function": self._function("back", self.back),
            "left": quote(self.left),
            "guard": quote(self.guard),
            "guard_function": self._function("guard", self.guard),
            "kept": within(self.kept),
            "convert": SQL("pg_temp.openmemory_migrations_convert"),
            "spread_convert": within(self.convert),
            "comment": literal(self.comment),
        }
