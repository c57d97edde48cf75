"""What a column has beside its values, so that another can take its place: NOT NULL, default, comment, privileges.

Everything here is quick and belongs into a transaction with other changes, but for `prove_not_null`, which reads the
whole table without keeping anybody from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import locks, partitions
from ..db.catalog import Table
from ..db.context import Context, TableContext
from ..db.database import Database
from ..db.partitions import Part
from ..db.sqlerrors import DENIED, sqlstate
from ..errors import MigrationError
from ..sql import SQL, blocks, literal, quote

BLOCKS = blocks("columns")

CHECK_VIOLATION = "23514"
TAKEN = ("42710", "42704", "42P16")  # the name of the constraint, or one of a partition's is another
OPTION = re.compile(r"n_distinct(_inherited)?=-?[0-9.]+([eE][-+]?[0-9]+)?")
# so that a default has the schema of whatever it names, and its constants mean the same when it is set again
QUALIFIED = {"search_path": "pg_catalog, pg_temp", "standard_conforming_strings": "on"}
GRANT = "GRANT {privilege} ({column}) ON TABLE {table} TO {role}{option}"
REVOKE = "REVOKE {privilege} ({column}) ON TABLE {table} FROM {role} CASCADE"
NO_SUCH_ROLE = "22023"
PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "REFERENCES")  # on a column
COMPRESSION = {"p": "pglz", "l": "lz4"}
STORAGE = {"p": "PLAIN", "e": "EXTERNAL", "x": "EXTENDED", "m": "MAIN"}


@dataclass(frozen=True)
class Grant:
    role: str | None  # None: PUBLIC
    privilege: str
    grantable: bool
    grantor: str | None = None  # None: the table's owner


@dataclass(frozen=True)
class Attributes:
    """`default` is SQL; `storage`, `compression`, `statistics` and `options` as in pg_attribute. From PostgreSQL 18 on
    the constraint by which a column is NOT NULL has a name, and may have a comment."""

    not_null: bool
    default: str | None
    comment: str | None
    storage: str
    compression: str
    statistics: int | None
    grants: tuple[Grant, ...]
    options: tuple[str, ...] = ()
    not_null_name: str | None = None
    not_null_comment: str | None = None

    def as_data(self) -> dict[str, Any]:
        """What can go through JSON and back."""
        return {**vars(self), "grants": grants_as_data(self.grants)}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Attributes:
        """Raises ValueError, LookupError or TypeError for what as_data() hasn't made: a comment can be changed."""
        options = tuple(data.get("options", ()))
        found = cls(**{**data, "grants": grants_of_data(data["grants"]), "options": options})
        texts = (found.default, found.comment, found.not_null_name, found.not_null_comment)
        numbers = (found.statistics,)
        if (
            found.storage not in STORAGE
            or found.compression not in ("", *COMPRESSION)
            or not all(text is None or isinstance(text, str) for text in texts)
            or not all(number is None or isinstance(number, int) for number in numbers)
            or not all(OPTION.fullmatch(option) for option in found.options)
        ):
            raise ValueError(data)
        return found


def grants_as_data(grants: Iterable[Grant]) -> list[list[Any]]:
    return [[g.role, g.privilege, g.grantable, g.grantor] for g in grants]


def grants_of_data(data: Iterable[Iterable[Any]]) -> tuple[Grant, ...]:
    grants = tuple(Grant(*grant) for grant in data)
    roles = [role for grant in grants for role in (grant.role, grant.grantor)]
    if not all(grant.privilege in PRIVILEGES for grant in grants) or not all(
        isinstance(role, (str, type(None))) for role in roles
    ):
        raise ValueError(grants)
    return grants


def attributes(db: Database, column: str) -> Attributes:
    """Those of a column of the table that `db` names."""
    where = {"table_text": literal(db.names["table"]), "column_text": literal(column)}
    with db.local(QUALIFIED):
        ((oid, not_null, default, comment, storage, compression, statistics, has_grants, options, *named),) = db.rows(
            BLOCKS.attributes, **where
        )
    own = _grants(db, [oid], column)[oid] if has_grants else ()
    compression = compression.strip("\0")
    return Attributes(not_null, default, comment, storage, compression, statistics, own, tuple(options), *named)


def grants(db: Database, parts: Sequence[Part], column: str) -> dict[str, tuple[Grant, ...]]:
    """The privileges on the column that each of these tables has of its own, by their names; one query for all."""
    found = _grants(db, [part.oid for part in parts], column)
    return {part.sql_name: found[part.oid] for part in parts}


def _grants(db: Database, tables: Sequence[int], column: str) -> dict[int, tuple[Grant, ...]]:
    found: dict[int, tuple[Grant, ...]] = dict.fromkeys(tables, ())
    for oid, *grant in db.rows(BLOCKS.grants, {"tables": list(tables), "column": column}):
        found[oid] += (Grant(*grant),)
    return found


def dependents(db: Database, table: Table, column: str, *ours: str) -> list[str]:
    """What hangs on a column and would not go over to another: views, indexes, generated columns, others' triggers."""
    tables = [part.oid for part in partitions.parts(db, table.oid)]
    found = list(db.rows(BLOCKS.dependents, {"tables": tables, "column": column, "ours": list(ours)}))
    if tables[1:]:
        root = attributes(db, column)
        with db.local(QUALIFIED):  # as the default of the root was read
            found += db.rows(
                BLOCKS.of_parts,
                {"tables": tables[1:]},
                column_text=literal(column),
                not_null=root.not_null,
                default_text=literal(root.default or ""),
            )
    return [text for (text,) in found]


def exchange(db: Database, parts: Sequence[Part], column: str, name: str, aside: str, wanted: Attributes) -> None:
    """`column` takes the place of the one called `name`, which is called `aside` from then on. Privileges go by name:
    whoever may read or write `name` may go on."""
    of_name, of_column = grants(db, parts, name), grants(db, parts, column)
    _rename(db, name, aside)
    take_place(db, parts, column, name, wanted, of_name)
    grant(db, parts, aside, of_column)


def take_place(
    db: Database,
    parts: Sequence[Part],
    column: str,
    name: str,
    wanted: Attributes,
    privileges: Mapping[str, tuple[Grant, ...]],
) -> None:
    """`column` is called `name`, with the NOT NULL and the default that are wanted, and these privileges; for NOT NULL
    `prove_not_null` comes before."""
    _rename(db, column, name)
    grant(db, parts, name, privileges)
    there = attributes(db, name)
    # either goes for the partitions too, which may have their own
    if there.not_null != wanted.not_null:
        require(db, name, wanted.not_null)
    unprove_not_null(db)
    if wanted.not_null:
        _name_not_null(db, name, wanted)
    if there.default != wanted.default:
        set_default(db, name, wanted.default)


def _name_not_null(db: Database, column: str, wanted: Attributes) -> None:
    """The constraint is called as it was; where something else has that name by now, it keeps the server's choice."""
    there = attributes(db, column)
    if there.not_null_name is None or wanted.not_null_name is None:
        return
    name = quote(there.not_null_name)
    try:
        if there.not_null_name != wanted.not_null_name:
            with db.attempt():
                to = quote(wanted.not_null_name)
                db.run("ALTER TABLE {table} RENAME CONSTRAINT {name} TO {to}", name=name, to=to)
                name = to
    except DBAPIError as error:
        if sqlstate(error) not in TAKEN:
            raise
        log.notice(f"the constraint by which {quote(column)} of {db.names['table']} is NOT NULL is called {name} now")
    if there.not_null_comment != wanted.not_null_comment:
        text = SQL("NULL") if wanted.not_null_comment is None else literal(wanted.not_null_comment)
        db.run("COMMENT ON CONSTRAINT {name} ON {table} IS {text}", name=name, text=text)


def _rename(db: Database, column: str, to: str) -> None:
    db.run("ALTER TABLE {table} RENAME COLUMN {column} TO {to}", column=quote(column), to=quote(to))


def prove_not_null(ctx: TableContext, column: str) -> None:
    """Leaves a constraint, valid, by which SET NOT NULL needn't read the table. Raises MigrationError for a NULL.

    Until it is dropped it refuses the writes that the NOT NULL is going to refuse.
    """
    db = ctx.db
    names = {"column": quote(column)}

    def add() -> None:
        unprove_not_null(db)
        db.run("ALTER TABLE {table} ADD CONSTRAINT {left} CHECK ({column} IS NOT NULL) NOT VALID", **names)

    what = f"requiring {quote(column)} of {ctx.target}"
    locks.retried(db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, add)
    try:
        with db.transaction():
            db.run("ALTER TABLE {table} VALIDATE CONSTRAINT {left}")
    except BaseException as error:
        if db.usable:
            locks.retried(db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, lambda: unprove_not_null(db))
        if isinstance(error, DBAPIError) and sqlstate(error) == CHECK_VIOLATION:
            try:
                require_values(ctx, column)
            except MigrationError as missing:
                raise missing from error
        raise


def require_values(ctx: TableContext, column: str) -> None:
    """Raises MigrationError for rows without a value: of a column whose NOT NULL was never validated, too."""
    db = ctx.db
    with db.transaction(snapshot=True):
        rows = db.value("SELECT count(*) FROM {table} WHERE {column} IS NULL", column=quote(column))
    if rows:
        raise MigrationError(
            f"{rows:,} rows of {ctx.target} have no {quote(column)}, which is to be NOT NULL",
            hint=f"Delete or mend them: SELECT … FROM {db.names['table']} WHERE {quote(column)} IS NULL.",
        )


def has_proof(ctx: Context) -> bool:
    """Asked without a lock on the table, which to drop nothing takes as well."""
    there = "SELECT EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE conrelid = CAST(:table AS regclass)"
    return bool(
        ctx.db.value(there + " AND conname = :name)", {"table": ctx.db.names["table"], "name": ctx.target.left})
    )


def unprove_not_null(db: Database) -> None:
    db.quietly("ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {left}")


def require(db: Database, column: str, not_null: bool) -> None:
    """Sets or takes NOT NULL; to set it without reading the table, `prove_not_null` comes before."""
    action = SQL("SET" if not_null else "DROP")
    db.run("ALTER TABLE {table} ALTER COLUMN {column} {action} NOT NULL", column=quote(column), action=action)


def set_default(db: Database, column: str, default: str | None) -> None:
    action = SQL("DROP DEFAULT" if default is None else f"SET DEFAULT {default}")  # as the server has printed it
    with db.local({"standard_conforming_strings": "on"}):
        db.run("ALTER TABLE {table} ALTER COLUMN {column} {action}", column=quote(column), action=action)


def comment(db: Database, column: str, text: str | None) -> None:
    shown = literal(text) if text else SQL("NULL")
    db.run("COMMENT ON COLUMN {table}.{column} IS {text}", column=quote(column), text=shown)


def grant(db: Database, parts: Sequence[Part], column: str, wanted: Mapping[str, tuple[Grant, ...]]) -> None:
    """Leaves the column of each of the tables that are named with these privileges of its own, and no others; those on
    the table aren't touched."""
    present = grants(db, parts, column)
    for part in parts:
        at, there = part.at(db), present[part.sql_name]
        to_be = wanted.get(part.sql_name, there)
        if gone := [one for one in there if one not in to_be]:
            for one in gone:
                if not _as_grantor(at, REVOKE, column, one):
                    # with all that has been handed on: what is to stay is granted again below
                    for origin in there:
                        if origin.grantor is None and origin.grantable and origin.privilege == one.privilege:
                            _grant(at, REVOKE, column, origin)
            there = grants(at, [part], column)[part.sql_name]
        left = [one for one in to_be if one not in there and (one.role is None or _exists(db, one.role))]
        # whoever hands them on has to have them with the option
        able = {(one.role, one.privilege) for one in there if one.grantable}
        while left:
            now = [one for one in left if one.grantor is None or (one.grantor, one.privilege) in able]
            for one in now or left:
                if not now or not _as_grantor(at, GRANT, column, one):
                    log.notice(
                        f"{one.privilege} on {quote(column)} of {at.names['table']} is granted to"
                        f" {quote(one.role or 'public')} by the table's owner now: this role may not act as"
                        f" {quote(one.grantor or '')}"
                    )
                    _grant(at, GRANT, column, one)
            able |= {(one.role, one.privilege) for one in now if one.grantable}
            left = [one for one in left if now and one not in now]


def _as_grantor(db: Database, action: str, column: str, one: Grant) -> bool:
    """As whoever has granted it, if this role may act as them."""
    if one.grantor is None:
        _grant(db, action, column, one)
        return True
    try:
        with db.attempt(), db.local({"role": one.grantor}):
            _grant(db, action, column, one)
    except DBAPIError as error:
        if sqlstate(error) not in (DENIED, NO_SUCH_ROLE):
            raise
        return False
    return True


def _exists(db: Database, role: str) -> bool:
    """A role may have been dropped since its privileges were noted; says so."""
    if db.value("SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = :role)", {"role": role}):
        return True
    log.warning(f"there is no role {quote(role)} any more that had privileges on a column of {db.names['table']}")
    return False


def _grant(db: Database, action: str, column: str, one: Grant) -> None:
    db.run(
        action,
        privilege=SQL(one.privilege),
        column=quote(column),
        role=SQL("PUBLIC") if one.role is None else quote(one.role),
        option=SQL(" WITH GRANT OPTION" if one.grantable else ""),
    )


def store(db: Database, column: str, wanted: Attributes) -> None:
    """How values are stored and looked at, of a column of the same type."""
    alter = "ALTER TABLE {table} ALTER COLUMN {column} "
    name = {"column": quote(column)}
    db.run(alter + "SET STORAGE {storage}", storage=SQL(STORAGE[wanted.storage]), **name)
    if wanted.compression:
        method = SQL(COMPRESSION[wanted.compression])
        db.run(alter + "SET COMPRESSION {method}", method=method, **name)
    if wanted.statistics is not None and wanted.statistics >= 0:
        db.run(alter + "SET STATISTICS {number}", number=wanted.statistics, **name)
    if wanted.options:
        db.run(alter + "SET ({options})", options=SQL(", ".join(wanted.options)), **name)
