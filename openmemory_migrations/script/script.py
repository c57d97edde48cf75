"""The three steps as SQL scripts, for `alembic upgrade head --sql`, on an ordinary table of bytes.

Nothing is asked here, the script asks. The first block of each step refuses a table of another kind.

What differs from database to database (the extension's schema, a column that is there already, how many rows there are)
is found out by DO blocks when the script runs. It ends in the state that the online steps end in; its backfill commits
batch by batch and continues where it was. For psql: CREATE INDEX CONCURRENTLY can't be dynamic without its \\gexec.
With OM_SINGLE_TRANSACTION there is no COMMIT, no CONCURRENTLY and nothing of psql's, for runners that put all in one
transaction.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..backfill.leftovers import NOT_FINITE
from ..columns import guard, marks
from ..cutover import kept
from ..db.catalog import Extension
from ..db.locks import TRIES
from ..encoding import native, sync_trigger
from ..encoding.stored import STORED
from ..errors import INDEX_ANEW
from ..index import build, choice
from ..index.choice import SLOWER, NoIndex, Plan
from ..settings import Settings
from ..steps.expand import EXTENSIONS_SCHEMA
from ..steps.interference import NAME_COLUMNS
from ..target import CUT_OVER as CUT_OVER_COMMENT
from ..target import OWN_COMMENT, SET_ASIDE, Target, literal, quote
from .blocks import (
    AGAIN,
    ALL_DONE,
    BACKFILL,
    BEGIN,
    BEGUN,
    BLOCK,
    BUILT,
    CONVERT_PAGES,
    COUNT,
    COUNT_PENDING,
    COUNT_RIGHT,
    CREATE,
    DONE,
    DROP,
    DROP_CONVERT,
    DROP_DUPLICATE,
    DROP_EXPAND,
    DROP_GUARD,
    DROP_INVALID,
    EACH,
    EXPAND,
    EXT,
    FIND_COLUMN,
    FIND_EXTENSION,
    GEXEC,
    HOLDERS,
    KEPT_EXISTS,
    LISTS,
    LOCK_FAILED,
    MEMORY,
    MEMORY_GIVEN,
    MOST_MEMORY,
    NEXT,
    NO_INDEX,
    OURS,
    PAGES,
    PENDING,
    PENDING_ADOPTED,
    PLACES,
    PORTABLE,
    PSQL,
    QUOTED,
    READ_COMMITTED,
    REASON,
    REMAINING,
    REQUIRE,
    REQUIRE_COLUMN,
    REQUIRE_ORDINARY,
    REQUIRE_SIZE,
    REQUIRE_TABLE,
    REST,
    SCARCE,
    SIZES,
    STAMP,
    TAG,
    TID,
    TIMED,
    TOGETHER,
    TRY_WRITE,
    UNTIMED,
    UNTIMED_HERE,
    VALUE,
    VALUE_ADOPTED,
    WAIT,
    WAITING,
)

RUNNING = "-- Running "  # of Alembic's, before each step


def opening(settings: Settings) -> str:
    """What a script begins with, in its transaction, before anything else."""
    return f"{TOGETHER if settings.single_transaction else PSQL.strip()}\n\n{READ_COMMITTED}"


def block(text: str) -> str:
    """A DO block in which `@tag@` stands for a dollar quote that nothing inside ends."""
    tag = "$script$"
    while tag in text:
        tag = f"{tag[:-1]}_$"
    return text.replace(TAG, tag).strip()


class Order:
    """What a setting of the session, or the transaction, holds when all that a script has so far is done."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.running = "step"  # as Alembic says it
        self.number = 0
        self.reached = literal("begun")

    def next(self, what: str) -> dict[str, str]:
        """For a block, or a stamp, that is done only where all before it have been."""
        single = self._settings.single_transaction
        before, self.number = self.reached, self.number + 1
        self.reached = literal(f"{self.running}, {self.number}")
        said = f"{what}: what comes before it in this script has failed, or was in another "
        hint = (
            "OM_SINGLE_TRANSACTION is for one that ends at the first error. With psql: psql -1 -v ON_ERROR_STOP=1 -f."
            if single
            else "Mend what the first error says, then run the script again from the revision that is stamped, by psql"
            " -v ON_ERROR_STOP=1 -f."
        )
        names = {"before": before, "after": self.reached, "local": "true" if single else "false"}
        names |= {"not_next": literal(said + ("transaction" if single else "session")), "not_next_hint": literal(hint)}
        names["lock_timeout"] = str(self._settings.lock_timeout_ms)
        return {"next": NEXT.format_map(names), "done": DONE.format_map(names)}


class Stamps(io.StringIO):
    """What Alembic prints, with its stamps made to fail unless all that comes before has been done."""

    def __init__(self, versions: str, settings: Settings) -> None:
        super().__init__()
        self._versions = versions
        self.order = Order(settings)

    def write(self, text: str) -> int:
        if text.startswith(RUNNING):
            self.order.running = text.removeprefix(RUNNING).strip()
        elif text.startswith(("INSERT INTO ", "UPDATE ", "DELETE FROM ")):  # the steps' own are in DO blocks
            stamp = literal(text.strip().removesuffix(";"))
            names = {"tag": TAG, "stamp": stamp, "versions": self._versions}
            text = block(STAMP.format_map(names | self.order.next("not stamped"))) + "\n\n"
        return super().write(text)


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
    order: Order  # a host's own script has one for each step

    def upgrade_expand(self) -> None:
        self.begin()
        self.emit(EXPAND)

    def downgrade_expand(self) -> None:
        self.begin()
        self.emit(DROP_EXPAND)

    def upgrade_backfill(self) -> None:
        self.begin(outside=True)
        self.emit(BACKFILL)
        self.end()

    def downgrade_backfill(self) -> None:
        self.begin()
        self.emit(BLOCK, "{require_ordinary}")

    def upgrade_finalize(self) -> None:
        self.begin(outside=True)
        wanted = self.index()
        if isinstance(wanted, NoIndex):
            problem = build.none(self.target, wanted)
            self.emit(
                BLOCK,
                REQUIRE,
                NO_INDEX,
                level="WARNING" if wanted.wanted else "NOTICE",
                no_index=literal(problem.message) + (f", HINT = {literal(problem.hint)}" if problem.hint else ""),
            )
        else:
            self.build_index(wanted)
        self.end()

    def build_index(self, wanted: Plan) -> None:
        single = self.settings.single_transaction
        memory = self.settings.index_memory
        most = {"most_memory": str(memory) if memory else MOST_MEMORY}
        sizes = SIZES.format_map(self.names() | self.rules() | most)
        statement = (
            f"CREATE INDEX {self.concurrently}{quote(self.target.index)} ON {self.target.names()['table']}"
            f" USING {wanted.method} ({wanted.expression})"
            f" WITH ({'lists = @lists@' if wanted.method == 'ivfflat' else wanted.options})"
        )
        names = {
            **self.rules(),
            **most,
            "sizes": sizes,
            "slower": SLOWER.replace("'", "''"),
            "index_anew": INDEX_ANEW,
            "local": "true" if single else "false",
            "given": f"{self.settings.index_memory}kB",
            "statement": literal(statement),
            "any_options": wanted.method == "ivfflat" and not self.settings.index_lists,
        }
        give = MEMORY_GIVEN if memory else MEMORY
        waiting = WAITING.replace("{query}", DROP_INVALID)
        self.emit_all(
            f"{COUNT}\n  {give}\n  {SCARCE}" + ("" if single else f"\n  {waiting}"),
            DROP_INVALID,
            CREATE,
            DROP_DUPLICATE,
            BUILT,
            **names,
        )
        if not single:
            self.write("RESET maintenance_work_mem;")

    def downgrade_finalize(self) -> None:
        self.begin(outside=True)
        waiting = "" if self.settings.single_transaction else "\n  " + WAITING.replace("{query}", DROP)
        self.emit_all("{require_ordinary}" + waiting, DROP)
        self.end()

    def begin(self, *, outside: bool = False) -> None:
        """Of a step; `outside` a transaction, unless the whole script is one."""
        if outside and not self.settings.single_transaction:
            self.write(f"{PSQL.strip()}\n\n{UNTIMED}")
        else:
            self.write(f"{opening(self.settings)} {UNTIMED_HERE}")
        if not self.order.number:
            self.write(BEGUN.format(scope="LOCAL" if self.settings.single_transaction else "SESSION"))

    def end(self) -> None:
        """Of a step that was outside a transaction."""
        if not self.settings.single_transaction:
            self.write(TIMED)

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
        return choice.plan(self.target, settings, extension, self.size, 10**9)

    def rules(self) -> dict[str, Any]:
        settings = self.settings
        half = choice.on_halfvec(self.settings, self.size)
        hnsw = settings.index == "hnsw"
        lists = settings.index_lists or (1 if hnsw else LISTS.format(least=choice.ROWS_A_LIST))
        return {
            "lists": f"{lists}::bigint" if isinstance(lists, int) else lists,
            "lists_unused": hnsw,
            "item": 8 + (2 if half else 4) * self.size,
            "m": settings.index_m,
            "rows_a_list": choice.ROWS_A_LIST,
            "samples": choice.LEAST_SAMPLES,
            "version": "'{0,7}'" if half else "'{0,5}'" if hnsw else "'{0}'",
        }

    def emit(self, template: str, *bodies: str, **more: Any) -> None:
        names = {**self.names(), **more}
        order = self.order.next("not run")
        names |= order | {"begin": BEGIN.format_map(order)}
        body = "\n  ".join(part.format_map(names) for part in bodies)
        self.write(block(template.format_map({**names, "body": body})))

    def emit_all(self, *parts: str, **more: Any) -> None:
        """Each part after the other: what a block does, and queries that return statements to execute."""
        queries = {part for part in parts if part.lstrip().startswith("SELECT")}
        if self.settings.single_transaction:
            self.emit(BLOCK, *(EACH.replace("{query}", part) if part in queries else part for part in parts), **more)
            return
        for part in parts:
            if part in queries:
                names = {**self.names(), **more}
                self.write(GEXEC.format(query=part.format_map(names).strip(), reached=self.order.reached))
            else:
                self.emit(BLOCK, part, **more)
        self.emit(BLOCK, *(ALL_DONE.replace("{query}", part) for part in parts if part in queries), **more)

    def sql(self, template: str) -> str:
        """A statement as a string constant, for EXECUTE; the extension's schema is still to be put in."""
        inner = {**self.target.names(), "ext": EXT, "size": str(self.size), "dimensions": str(self.size)}
        inner["table_text"] = literal(inner["table"])
        # of the vectors that are there, whatever is configured now
        inner["column_size"] = (
            "coalesce((SELECT nullif(atttypmod, -1) FROM pg_catalog.pg_attribute"
            f" WHERE attrelid = CAST({inner['table_text']} AS regclass)"
            f" AND attname = {literal(self.target.vector)}),"
            f" array_length(string_to_array(CAST({inner['vector']} AS text), ','), 1))"
        )
        return literal(template.strip("\n").format_map({**inner, "tag": sync_trigger.tag(inner.values())}))

    @property
    def create_trigger(self) -> str:
        """What makes the trigger and its functions, in a DO block that knows the extension's schema."""
        texts = (
            sync_trigger.CREATE_CONVERT,
            sync_trigger.CREATE_SYNC,
            "REVOKE ALL ON FUNCTION {sync_function}() FROM PUBLIC",
            sync_trigger.CREATE_TRIGGER,
            sync_trigger.FIRE_ALWAYS.replace("{trigger}", "{sync}"),
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
            "concurrently": self.concurrently,
            "tries": TRIES,
            "lock_failed": LOCK_FAILED,
            "rest": REST,
            "wait": WAIT.format(lock_timeout=settings.lock_timeout_ms),
            "lock_timeout": settings.lock_timeout_ms,
            "accept_loss": settings.accept_loss,
            "batch": settings.backfill_batch,
            "pages": PAGES,
            "places": PLACES,
            "tid_of_place": TID.format(place="place", places=PLACES),
            "tid_of_om_place": TID.format(place="om.place", places=PLACES),
            "tid_of_end": TID.format(place="(place + places)", places=PLACES),
            "extensions": EXTENSIONS_SCHEMA,
            "ext": literal(EXT),
            "quoted": QUOTED,
            "quoted_name": QUOTED.replace("extension", "nspname"),
            "own": literal(OWN_COMMENT),
            "not_finite": NOT_FINITE,
            "fail": settings.on_bad_rows == "fail",
            "sync_trigger": settings.sync_trigger,
            "commit": "" if settings.single_transaction else "COMMIT;",
            # or what they refuse would fail the COMMIT
            "immediate": "" if settings.single_transaction else "\n          SET CONSTRAINTS ALL IMMEDIATE;",
            "others_kept": "" if settings.single_transaction else " All others are converted.",
            "table_text": literal(own["table"]),
            "sync_text": literal(target.sync),
            "source_text": literal(target.source),
            "vector_text": literal(target.vector),
            "vector_shown": literal(quote(target.vector)),
            "adopted_text": literal(target.adopted),
            "label": literal(f"backfill {target.table}: "),
            "no_lock": literal(f"no lock on table {target} in {TRIES} tries of {settings.lock_timeout_ms} ms"),
            "no_table": literal(f"table {target} does not exist"),
            "index_text": literal(f"{own['schema']}.{quote(target.index)}"),
            "mirrored_text": literal(f"{own['schema']}.{quote(target.mirrored_index)}"),
            "name_taken": literal(f"no index: the name {quote(target.index)} is taken by something else"),
            "not_ordinary": literal(f"{target} is not an ordinary table"),
            "other_type": literal(f"column {quote(target.vector)} of {target} is of type "),
            "adopted_taken": literal(f"{target} has both {quote(target.vector)} and {quote(target.adopted)}"),
            "has_views": literal(f"column {quote(target.vector)} of {target} can't be replaced while views show it"),
            "has_rules": literal(f"updates of {target} can't be seen to have an effect, because of rule "),
            "disable_rule": literal(f"ALTER TABLE {own['table']} DISABLE RULE "),
            "no_source": literal(f"{target} needs a column {quote(target.source)} of type bytea"),
            "no_row": literal(f"no row of {target} holds a vector of {self.size} dimensions"),
            "no_column": literal(f"{target} has no column {quote(target.vector)} of this package"),
            "other_dimensions": literal(f" vectors of other than {self.size} dimensions have no source beside them"),
            "count_lost": sql(
                "SELECT count(*) FROM {table} WHERE {source} IS NULL AND {ext}.vector_dims({vector}) <> {size}"
            ),
            "rename": sql("ALTER TABLE {table} RENAME COLUMN {vector} TO {adopted}"),
            "count_sourceless": sql(
                "SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL AND " + STORED.without("{column_size}")
            ),
            "count_not_finite": sql(
                "SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL AND CASE WHEN age(xmin) @@ age($1) OR "
                f"{STORED.without('{column_size}')} THEN false ELSE {STORED.not_finite} END"
            ),
            "not_kept": sql(" AND {vector}::text IS DISTINCT FROM {adopted}::text"),
            "set_aside": sql("COMMENT ON COLUMN {table}.{adopted} IS "),
            "set_aside_comment": literal(SET_ASIDE),
            "set_aside_length": len(SET_ASIDE) + 1,
            "restore": sql("ALTER TABLE {table} RENAME COLUMN {adopted} TO {vector}"),
            "add": sql("ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {vector} {ext}.vector({size})"),
            "write": sql(
                "UPDATE ONLY {table} SET {source} = {source} WHERE ctid = (SELECT ctid FROM ONLY {table} LIMIT 1)"
            ),
            "write_fails": literal(f"UPDATE of {target} would fail from now on: in a trigger, SQLSTATE "),
            "name_columns": literal(NAME_COLUMNS.format(table=target.names()["table"])),
            "remark": sql("COMMENT ON COLUMN {table}.{vector} IS {comment}"),
            "drop_column": sql("ALTER TABLE {table} DROP COLUMN IF EXISTS {vector}"),
            "drop_adopted": sql("ALTER TABLE {table} DROP COLUMN IF EXISTS {adopted}"),
            "not_carried": sql(
                "SELECT count(*) FROM {table} WHERE {adopted} IS NOT NULL AND CASE WHEN {source} IS NULL"
                " THEN {vector}::text IS DISTINCT FROM {adopted}::text ELSE {vector} IS NULL END"
            ),
            "would_go": literal(f" values of {quote(target.adopted)} would be lost, so it stays"),
            "create_convert": sql(sync_trigger.CREATE_CONVERT),
            "drop_convert": "" if settings.sync_trigger else "\n  " + drop_convert,
            "guard_comment": literal(guard.COMMENT),
            "drop_trigger": f"""DROP TRIGGER IF EXISTS {own["sync"]} ON {own["table"]};
      DROP FUNCTION IF EXISTS {own["sync_function"]}();
      {drop_convert}""",
            "trigger": "\n      " + self.create_trigger if settings.sync_trigger else "",
            "kept_text": literal(own["kept"]),
            "kept_comment": literal(kept.COMMENT),
            "kept_away": literal(f"rows of {target} are in table {quote(target.kept)}, where a cutover has left them"),
            "kept_hint": literal(f"First put them back: {marks.UNDO}."),
            "mark_comment": literal(CUT_OVER_COMMENT),
            "was_swapped": literal(marks.said(target, "swap")),
            "was_dropped": literal(marks.said(target, "drop")),
            # the online run down refuses it as well
            "cut_over_hint": literal(marks.UNDO_HINT if self.direction == "downgrade" else self.online),
            "is_partitioned": literal(f"{target} is a partitioned table"),
            "is_partition": literal(f"{target} is a partition"),
            "is_child": literal(f"{target} inherits from another table"),
            "is_parent": literal(f"{target} is a table that others inherit from"),
            "is_vector": literal(f"column {quote(target.source)} of {target} is of type vector already"),
            "is_distributed": literal(f"{target} is distributed by Citus"),
            "online_hint": literal(f"Scripts (--sql) are for ordinary tables of bytes. {self.online}"),
        }
        for name, part in (
            ("holders", HOLDERS.replace("{seconds}", "0")),
            ("long_holders", HOLDERS.replace("{seconds}", "1")),
            ("again", AGAIN),
            ("drop_guard", DROP_GUARD),
            ("kept_exists", KEPT_EXISTS),
            ("try_write", TRY_WRITE),
            ("reason", REASON),
            ("length", STORED.length),
            ("of_length", STORED.of("{size}")),
            ("require_ordinary", REQUIRE_ORDINARY),
            ("require_table", REQUIRE_TABLE),
            ("find_extension", FIND_EXTENSION),
            ("find_column", FIND_COLUMN),
            ("require_column", REQUIRE_COLUMN),
            ("require_size", REQUIRE_SIZE),
            ("ours", OURS),
        ):
            names[name] = part.format_map(names)
        for which, pending, value in (("", PENDING, VALUE), ("_adopted", PENDING_ADOPTED, VALUE_ADOPTED)):
            for name, text in (
                ("count", COUNT_PENDING),
                ("convert_pages", CONVERT_PAGES),
                ("count_right", COUNT_RIGHT),
                ("remaining", REMAINING),
            ):
                names[name + which] = sql(text.replace("{pending}", pending).replace("{value}", value))
        names["same_bytes"] = sql("t.{source} IS NOT DISTINCT FROM batch.source")
        names |= {
            "portable": sql(PORTABLE),
            "native": sql(native.fit(self.size)),
            "create_native": sql(";\n".join(native.CREATE)),
            "try_native": literal(native.trial(ext=EXT)),
            "native_version": f"'{{{','.join(map(str, native.OLDEST))}}}'",
            "drop_native": native.DROP + ";",
            "may_be_native": settings.backfill_engine in (None, "native"),
            "has_to_be_native": settings.backfill_engine == "native",
        }
        aside = {"own": literal(SET_ASIDE), "vector_text": names["adopted_text"]}
        names["find_aside"] = FIND_COLUMN.format_map(names | aside)
        return names
