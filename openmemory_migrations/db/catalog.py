"""Read-only questions to the catalogs, answered with small frozen objects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..marks import BACK, TYPED, Marked
from ..sql import SQL, Fragment, blocks, joined, literal, quote
from ..target import Target, Trigger, derived
from . import partitions
from .database import Database

BLOCKS = blocks("db")


@dataclass(frozen=True)
class Extension:
    schema: str
    version: tuple[int, ...]

    def names(self) -> dict[str, SQL]:
        return {"ext": quote(self.schema)}


@dataclass(frozen=True)
class Column(Marked):
    """`type` as SQL names it, with its schema, without a modifier; `dimensions` None where it has none."""

    name: str
    type: str
    is_vector: bool
    dimensions: int | None
    comment: str

    @property
    def type_shown(self) -> str:
        return "vector" if self.is_vector else self.type


@dataclass(frozen=True)
class Table:
    oid: int
    kind: str  # pg_class.relkind
    owner: str
    owned: bool  # by this role, or by one that it is a member of
    has_children: bool
    is_partition: bool
    rows_hidden: bool  # row-level security applies to this role
    key: tuple[str, ...]  # columns of the primary key
    columns: dict[str, Column]


@dataclass(frozen=True)
class Index:
    """`column` is the one that it is on, or whose cast to halfvec of `half` dimensions; `key` says that, or else shows
    what the index is on."""

    name: str
    table_oid: int
    valid: bool
    method: str
    opclass: str
    column: str | None
    half: int | None
    key: str
    options: frozenset[str]  # as in pg_class.reloptions, with pgvector's defaults: name=value
    partial: bool
    size: int  # bytes

    def option(self, name: str) -> int:
        (value,) = (text.partition("=")[2] for text in self.options if text.startswith(f"{name}="))
        return int(value)


def server_version(db: Database) -> int:
    return int(db.value("SELECT current_setting('server_version_num')"))


def version(text: str) -> tuple[int, ...]:
    """`0.8.5` in parts that can be compared."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def require_extension(db: Database) -> Extension:
    """Where there is a column of its type."""
    found = extension(db)
    assert found is not None
    return found


def extension(db: Database) -> Extension | None:
    row: Any = db.run(BLOCKS.extension).one_or_none()
    return row and Extension(row[0], version(row[1]))


def available_version(db: Database) -> str | None:
    """The one that CREATE EXTENSION would bring."""
    found: str | None = db.value("SELECT default_version FROM pg_catalog.pg_available_extensions WHERE name = 'vector'")
    return found


def schema_exists(db: Database, schema: str) -> bool:
    return bool(
        db.value("SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = :schema)", {"schema": schema})
    )


def table(db: Database, schema: str, name: str) -> Table | None:
    found: Any = db.run(
        BLOCKS.table,
        {"schema": schema, "name": name},
    ).one_or_none()
    if found is None:
        return None
    oid, kind, owner, owned, has_children, is_partition, rows_hidden, key = found
    columns = db.rows(
        BLOCKS.columns,
        {"oid": oid},
    )
    return Table(
        oid=oid,
        kind=kind,
        owner=owner,
        owned=owned,
        has_children=has_children,
        is_partition=is_partition,
        rows_hidden=rows_hidden,
        key=tuple(key),
        columns={
            name: Column(
                name=name,
                type=type_name,
                is_vector=is_vector,
                dimensions=typmod if is_vector and typmod > 0 else None,
                comment=comment or "",
            )
            for name, type_name, is_vector, typmod, comment in columns
        },
    )


def indexes(db: Database, schema: str, *names: str) -> dict[str, Index]:
    """The indexes of that schema under these names, on whatever table they are."""
    where = {"schema_name": literal(schema), "index_names": joined(", ", map(literal, names))}
    return _indexes(db, BLOCKS.indexes_named, **where)


def indexes_on(db: Database, table_oid: int) -> list[Index]:
    """All indexes of a table."""
    return list(_indexes(db, BLOCKS.indexes_on, of_table=table_oid).values())


def own_indexes(db: Database, target: Target, table_oid: int, *names: str) -> dict[str, Index]:
    """Those under one of these names, or else under either that finalize gives, which are on all vectors of the table.
    Any other is not ours, whatever it is called."""
    where = own_names(target, *names or (target.index, target.mirrored_index))
    return _indexes(db, BLOCKS.own_indexes, of_table=table_oid, **where)


def own_names(target: Target, *indexes: str) -> dict[str, SQL]:
    """What own_indexes is asked with, but for the table."""
    return {
        "schema_name": literal(target.schema),
        "vector_name": literal(target.vector),
        "index_names": joined(", ", map(literal, indexes)),
    }


def _indexes(db: Database, block: str, **names: Fragment) -> dict[str, Index]:
    found = db.rows(BLOCKS.with_sizes, found=db.sql(block, **names))
    return {
        name: Index(name, table_oid, valid, method, opclass, column, half, key, frozenset(options), partial, size)
        for _, name, table_oid, valid, method, opclass, column, half, key, options, partial, _, size in found
    }


def located(db: Database, target: Target) -> Target:
    """With what the table has of ours, under the names of now: triggers, which are known by their marks; the index,
    by its mark, which keeps its name where the table gets another; and another function where the one
    by its name is that of another table, which had that name before."""
    marks = {"sync": target.comment, "back": BACK + target.archive, "typing": TYPED + target.source}
    named = {"schema": target.schema, "name": target.table}
    found = db.rows(BLOCKS.own_triggers, {**marks, **named})
    triggers = [Trigger(kind, name, (schema, of)) for kind, name, schema, of in found]
    there = {trigger.kind for trigger in triggers}
    own = {"sync": target.sync, "back": target.back, "typing": target.typing, "guard": target.guard}
    shared = db.rows(
        BLOCKS.shared_functions, {**named, **{kind: None if kind in there else name for kind, name in own.items()}}
    )
    triggers += [Trigger(kind, name, (target.schema, derived(name, f"_{oid}"))) for kind, name, oid in shared]
    where = {"table_text": literal(quote(target.schema, target.table)), "vector_name": literal(target.vector)}
    its = [
        name
        for (name,) in db.rows(
            BLOCKS.indexes_of_ours, {"comment": target.comment, "index_comment": target.index_comment}, **where
        )
    ]
    found_index = its[0] if len(its) == 1 and its[0] not in target.indexes else target.index_name
    return replace(target, triggers=tuple(triggers), index_name=found_index)


def sees_others(db: Database) -> bool:
    """Whether this role sees what other roles' sessions are doing, and how far replicas are."""
    return bool(db.value("SELECT pg_has_role('pg_read_all_stats', 'USAGE')"))


def trigger_enabled(db: Database, table_oid: int, name: str) -> bool:
    """For ordinary writers, on the table and on each of its partitions, which have clones of it."""
    return bool(
        db.value(
            BLOCKS.trigger_enabled,
            {"tables": [part.oid for part in partitions.parts(db, table_oid)], "name": name},
        )
    )


def relation_exists(db: Database, schema: str, name: str) -> bool:
    """Whether the name is taken by a table, view, sequence, index or type of a row."""
    return bool(
        db.value(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = :schema AND c.relname = :name)",
            {"schema": schema, "name": name},
        )
    )


def vector_oid(db: Database) -> int:
    """The type's, which differs from database to database."""
    return int(db.value(BLOCKS.vector_oid))
