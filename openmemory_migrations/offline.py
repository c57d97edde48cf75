"""The three steps as SQL scripts, for `alembic upgrade head --sql`, on an ordinary table of bytes.

Nothing is asked here, the script asks. The first block of each step refuses a table of another kind.

What differs from database to database (the extension's schema, a column that is there already, how many rows there are)
is found out by DO blocks when the script runs. It ends in the state that the online steps end in; its backfill commits
batch by batch and continues where it was. For psql: CREATE INDEX CONCURRENTLY can't be dynamic without its \\gexec.
With OM_SINGLE_TRANSACTION there is no COMMIT, no CONCURRENTLY and nothing of psql's, for runners that put all in one
transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from . import indexes, synctrigger
from .catalog import Extension
from .cutover import kept, mark
from .expand import EXTENSIONS_SCHEMA
from .indexes import NoIndex, Plan
from .leftovers import NOT_FINITE
from .locks import TRIES
from .offline_sql import (
    AGAIN,
    BACKFILL,
    BUILT,
    CONVERT_PAGES,
    COUNT,
    CREATE,
    DROP,
    DROP_CONVERT,
    DROP_DUPLICATE,
    DROP_EXPAND,
    DROP_INVALID,
    EACH,
    EXPAND,
    EXT,
    FIND_COLUMN,
    FIND_EXTENSION,
    KEPT_EXISTS,
    LISTS,
    LOCK_FAILED,
    MEMORY,
    OURS,
    PAGES,
    QUOTED,
    REASON,
    REFUSE,
    REQUIRE,
    REQUIRE_COLUMN,
    REQUIRE_ORDINARY,
    REQUIRE_SIZE,
    REQUIRE_TABLE,
    SIZES,
    TAG,
)
from .settings import MAX_DIMENSIONS, Settings
from .target import CUT_OVER as CUT_OVER_COMMENT
from .target import OWN_COMMENT, SET_ASIDE, Target, literal, quote

# before a DO block, since none can put off the statement_timeout that it has begun under. CONCURRENTLY waits for
# others, and what has to be quick sets a lock_timeout of its own
UNTIMED, TIMED = "SET lock_timeout = '1h'; SET statement_timeout = 0;", "RESET lock_timeout; RESET statement_timeout;"
UNTIMED_HERE = "SET LOCAL statement_timeout = 0;"


@dataclass(frozen=True)
class Script:
    """Writes one step after the other to the script that Alembic prints, through `write`.

    `direction` and `destination` are those of Alembic's command; a context that was made by hand has no destination.
    """

    target: Target
    settings: Settings
    size: int
    direction: Literal["upgrade", "downgrade"]
    destination: str | None
    write: Callable[[str], None]

    def upgrade_expand(self) -> None:
        self.write(UNTIMED_HERE)
        self.emit(EXPAND)

    def downgrade_expand(self) -> None:
        self.write(UNTIMED_HERE)
        self.emit(DROP_EXPAND)

    def upgrade_backfill(self) -> None:
        single = self.settings.single_transaction
        self.stop_at_errors()
        self.write(UNTIMED_HERE if single else UNTIMED)
        self.emit(BACKFILL)
        if not single:
            self.write(TIMED)

    def downgrade_backfill(self) -> None:
        self.emit(REFUSE)

    def upgrade_finalize(self) -> None:
        self.stop_at_errors()
        wanted = self.index()
        if isinstance(wanted, NoIndex):
            self.emit(REQUIRE)
            self.write(f"-- no index: {wanted.reason}")
        else:
            self.build_index(wanted)

    def build_index(self, wanted: Plan) -> None:
        single = self.settings.single_transaction
        sizes = SIZES.format_map(self.names() | self.rules())
        names = {**self.rules(), "sizes": sizes, "local": "true" if single else "false"}
        self.write(UNTIMED_HERE if single else UNTIMED)
        self.emit(COUNT, **names)
        if self.settings.index_memory:
            self.write(f"SET {'LOCAL ' if single else ''}maintenance_work_mem = '{self.settings.index_memory}kB';")
        else:
            self.emit(MEMORY, **names)
        statement = (
            f"CREATE INDEX {self.concurrently}{quote(self.target.index)} ON {self.target.names()['table']}"
            f" USING {wanted.method} ({wanted.expression})"
            f" WITH ({'lists = @lists@' if wanted.method == 'ivfflat' else wanted.options})"
        )
        self.emit_each(DROP_INVALID)
        self.emit_each(CREATE, **names, statement=literal(statement))
        self.emit_each(DROP_DUPLICATE, any_options=wanted.method == "ivfflat" and not self.settings.index_lists)
        if not single:
            self.write(TIMED + " RESET maintenance_work_mem;")
        self.emit(BUILT)

    def downgrade_finalize(self) -> None:
        self.stop_at_errors()
        self.emit(REFUSE)
        self.emit_each(DROP)

    def stop_at_errors(self) -> None:
        """Outside a transaction psql would go on after an error, to the stamp, unless it was told otherwise."""
        if not self.settings.single_transaction:
            self.write("\\set ON_ERROR_STOP on")

    @property
    def online(self) -> str:
        """What to do with a table that is not for scripts."""
        return f"Run it online: alembic {self.direction} {self.destination}." if self.destination else "Run it online."

    @property
    def concurrently(self) -> str:
        return "" if self.settings.single_transaction else "CONCURRENTLY "

    def index(self) -> Plan | NoIndex:
        # as if there were rows enough; the script counts them
        settings = self.settings if self.settings.index_lists else replace(self.settings, index_lists=1)
        extension = Extension(EXT.strip('"'), (99,))
        return indexes.plan(self.target, settings, extension, self.size, 10**9)

    def rules(self) -> dict[str, Any]:
        settings = self.settings
        half = indexes.on_halfvec(self.settings, self.size)
        hnsw = settings.index == "hnsw"
        lists = settings.index_lists or (1 if hnsw else LISTS.format(least=indexes.ROWS_A_LIST))
        return {
            "lists": f"{lists}::bigint" if isinstance(lists, int) else lists,
            "lists_unused": hnsw,
            "item": 8 + (2 if half else 4) * self.size,
            "m": settings.index_m,
            "rows_a_list": indexes.ROWS_A_LIST,
            "samples": indexes.LEAST_SAMPLES,
            "version": "'{0,7}'" if half else "'{0,5}'" if hnsw else "'{0}'",
        }

    def emit(self, template: str, **more: Any) -> None:
        names = {**self.names(), **more}
        body = template.format_map(names)
        tag = "$script$"
        while tag in body:
            tag = f"{tag[:-1]}_$"
        self.write(body.replace(TAG, tag).strip())

    def emit_each(self, query: str, **more: Any) -> None:
        """Has every statement executed that the query returns."""
        if not self.settings.single_transaction:
            self.emit(query.rstrip() + "\n\\gexec", **more)
            return
        # all of them first: a query that is still being read keeps its table from CREATE INDEX
        self.emit(EACH.replace("{query}", query), **more)

    def sql(self, template: str) -> str:
        """A statement as a string constant, for EXECUTE; the extension's schema is still to be put in."""
        inner = {**self.target.names(), "ext": EXT, "size": str(self.size), "dimensions": str(self.size)}
        return literal(template.strip("\n").format_map({**inner, "tag": synctrigger.tag(inner.values())}))

    @property
    def create_trigger(self) -> str:
        """What makes the trigger and its functions, in a DO block that knows the extension's schema."""
        texts = (
            synctrigger.CREATE_CONVERT,
            synctrigger.CREATE_SYNC,
            "REVOKE ALL ON FUNCTION {sync_function}() FROM PUBLIC",
            synctrigger.CREATE_TRIGGER,
            "COMMENT ON TRIGGER {sync} ON {table} IS {comment}",
        )
        return "\n      ".join(f"EXECUTE replace({self.sql(text)}, {literal(EXT)}, {QUOTED});" for text in texts)

    def names(self) -> dict[str, Any]:
        target, settings, sql = self.target, self.settings, self.sql
        own = target.names()
        drop_convert = DROP_CONVERT.format(
            call=literal(own["convert"] + "("), function=own["convert"] + "(bytea, integer)"
        )
        names: dict[str, Any] = {
            **own,
            "tag": TAG,
            "size": self.size,
            "most": MAX_DIMENSIONS,
            "most_shown": f"{MAX_DIMENSIONS:,}",
            "concurrently": self.concurrently,
            "tries": TRIES,
            "lock_failed": LOCK_FAILED,
            "lock_timeout": settings.lock_timeout_ms,
            "accept_loss": settings.accept_loss,
            "batch": settings.backfill_batch,
            "pages": PAGES,
            "extensions": EXTENSIONS_SCHEMA,
            "ext": literal(EXT),
            "quoted": QUOTED,
            "quoted_name": QUOTED.replace("extension", "nspname"),
            "own": literal(OWN_COMMENT),
            "not_finite": NOT_FINITE,
            "fail": settings.on_bad_rows == "fail",
            "sync_trigger": settings.sync_trigger,
            "commit": "" if settings.single_transaction else "COMMIT;",
            "table_text": literal(own["table"]),
            "source_text": literal(target.source),
            "vector_text": literal(target.vector),
            "vector_shown": literal(quote(target.vector)),
            "adopted_text": literal(target.adopted),
            "label": literal(f"backfill {target.table}: "),
            "no_table": literal(f"table {target} does not exist"),
            "index_text": literal(f"{own['schema']}.{quote(target.index)}"),
            "mirrored_text": literal(f"{own['schema']}.{quote(target.mirrored_index)}"),
            "name_taken": literal(f"no index: the name {quote(target.index)} is taken by something else"),
            "not_ordinary": literal(f"{target} is not an ordinary table"),
            "other_type": literal(f"column {quote(target.vector)} of {target} is of type "),
            "adopted_taken": literal(f"{target} has both {quote(target.vector)} and {quote(target.adopted)}"),
            "has_views": literal(f"column {quote(target.vector)} of {target} can't be replaced while views show it"),
            "no_source": literal(f"{target} needs a column {quote(target.source)} of type bytea"),
            "no_row": literal(f"no row of {target} holds a vector of {self.size} dimensions"),
            "no_column": literal(f"{target} has no column {quote(target.vector)} of this package"),
            "other_dimensions": literal(f" vectors of other than {self.size} dimensions have no source beside them"),
            "count_lost": sql(
                "SELECT count(*) FROM {table} WHERE {source} IS NULL AND {ext}.vector_dims({vector}) <> {size}"
            ),
            "rename": sql("ALTER TABLE {table} RENAME COLUMN {vector} TO {adopted}"),
            "count_sourceless": sql(
                "SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL"
                " AND ({source} IS NULL OR octet_length({source}) <> 4 * {size})"
            ),
            "not_kept": sql(" AND {vector}::text IS DISTINCT FROM {adopted}::text"),
            "set_aside": sql("COMMENT ON COLUMN {table}.{adopted} IS "),
            "set_aside_comment": literal(SET_ASIDE),
            "set_aside_length": len(SET_ASIDE) + 1,
            "restore": sql("ALTER TABLE {table} RENAME COLUMN {adopted} TO {vector}"),
            "add": sql("ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {vector} {ext}.vector({size})"),
            "remark": sql("COMMENT ON COLUMN {table}.{vector} IS {comment}"),
            "drop_column": sql("ALTER TABLE {table} DROP COLUMN IF EXISTS {vector}"),
            "drop_adopted": sql("ALTER TABLE {table} DROP COLUMN IF EXISTS {adopted}"),
            "carry_over": sql(
                "UPDATE {table} SET {vector} = {adopted}"
                " WHERE {source} IS NULL AND {vector} IS NULL AND {adopted} IS NOT NULL"
            ),
            "convert_pages": sql(CONVERT_PAGES),
            "create_convert": sql(synctrigger.CREATE_CONVERT),
            "drop_convert": "" if settings.sync_trigger else "\n  " + drop_convert,
            "drop_trigger": f"""DROP TRIGGER IF EXISTS {own["sync"]} ON {own["table"]};
      DROP FUNCTION IF EXISTS {own["sync_function"]}();
      {drop_convert}""",
            "trigger": "\n      " + self.create_trigger if settings.sync_trigger else "",
            "kept_text": literal(own["kept"]),
            "kept_comment": literal(kept.COMMENT),
            "kept_away": literal(f"rows of {target} are in table {quote(target.kept)}, where a cutover has left them"),
            "kept_hint": literal(f"First put them back: {mark.UNDO}."),
            "mark_comment": literal(CUT_OVER_COMMENT),
            "was_swapped": literal(mark.said(target, "swap")),
            "was_dropped": literal(mark.said(target, "drop")),
            # the online run down refuses it as well
            "cut_over_hint": literal(mark.UNDO_HINT if self.direction == "downgrade" else self.online),
            "is_partitioned": literal(f"{target} is a partitioned table"),
            "is_partition": literal(f"{target} is a partition"),
            "is_child": literal(f"{target} inherits from another table"),
            "is_parent": literal(f"{target} is a table that others inherit from"),
            "is_vector": literal(f"column {quote(target.source)} of {target} is of type vector already"),
            "is_distributed": literal(f"{target} is distributed by Citus"),
            "online_hint": literal(f"Scripts (--sql) are for ordinary tables of bytes. {self.online}"),
        }
        for name, part in (
            ("again", AGAIN),
            ("kept_exists", KEPT_EXISTS),
            ("reason", REASON),
            ("require_ordinary", REQUIRE_ORDINARY),
            ("require_table", REQUIRE_TABLE),
            ("find_extension", FIND_EXTENSION),
            ("find_column", FIND_COLUMN),
            ("require_column", REQUIRE_COLUMN),
            ("require_size", REQUIRE_SIZE),
            ("ours", OURS),
        ):
            names[name] = part.format_map(names)
        aside = {"own": literal(SET_ASIDE), "vector_text": names["adopted_text"]}
        names["find_aside"] = FIND_COLUMN.format_map(names | aside)
        return names
