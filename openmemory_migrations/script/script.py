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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from ..backfill import passes
from ..backfill.leftovers import NOT_FINITE
from ..columns import cutover_mark
from ..db import locks, tries
from ..db.catalog import Extension
from ..db.database import PATH, WHATEVER
from ..encoding import native, sync_trigger
from ..encoding.stored import STORED
from ..encoding.sync_trigger import CONVERT
from ..index import build, choice
from ..index.choice import NoIndex, Plan
from ..index.formula import Formula
from ..marks import KEPT
from ..settings import Settings
from ..sql import FUNCTION, SQL, Argument, Fragment, blocks, dollar_quote, fill, joined, literal, quote
from ..steps import interference, requirements, statements
from ..target import Target

BLOCKS = blocks("script")
PLACES = 2048  # that a row may have in a page, and more, whatever the size of a block
PAGES = 64  # of heap, in one batch at most: some 14,000 of the smallest rows

# which return statements to execute
QUERIES = {BLOCKS.drop, BLOCKS.drop_invalid, BLOCKS.create, BLOCKS.drop_duplicate}

RUNNING = "-- Running "  # of Alembic's, before each step


def opening(settings: Settings) -> str:
    """What a script begins with, in its transaction, before anything else."""
    first = BLOCKS.together if settings.single_transaction else BLOCKS.psql
    return f"{first}\n\n{BLOCKS.read_committed}"


def block(template: str, names: Mapping[str, Fragment | str]) -> SQL:
    """A DO block, in a dollar quote that nothing inside ends."""
    return fill(template, {**names, "tag": dollar_quote([template, *names.values()])})


class Order:
    """What a setting of the session, or the transaction, holds when all that a script has so far is done."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.running = "step"  # as Alembic says it
        self.number = 0
        self.reached = "begun"

    def next(self, what: str) -> dict[str, Fragment | str]:
        """For a block, or a stamp, that is done only where all before it have been."""
        single = self._settings.single_transaction
        before, self.number = self.reached, self.number + 1
        self.reached = f"{self.running}, {self.number}"
        said = f"{what}: what comes before it in this script has failed, or was in another "
        hint = (
            "OM_SINGLE_TRANSACTION is for one that ends at the first error. With psql: psql -1 -v ON_ERROR_STOP=1 -f."
            if single
            else "Mend what the first error says, then run the script again from the revision that is stamped, by psql"
            " -v ON_ERROR_STOP=1 -f."
        )
        return {
            "before": before,
            "after": self.reached,
            "local": single,
            "not_next": said + ("transaction" if single else "session"),
            "not_next_hint": hint,
            "lock_timeout": self._settings.lock_timeout_ms,
            "path": WHATEVER[PATH],
        }


class StampGuard(io.StringIO):
    """What Alembic prints, with its stamps made to fail unless all that comes before has been done."""

    def __init__(self, versions: SQL, settings: Settings) -> None:
        super().__init__()
        self._versions, self._settings = versions, settings
        self.order = Order(settings)

    def write(self, text: str) -> int:
        if text.startswith(RUNNING):
            self.order.running = text.removeprefix(RUNNING).strip()
        elif text.startswith(("INSERT INTO ", "UPDATE ", "DELETE FROM ")):  # the steps' own are in DO blocks
            names: dict[str, Fragment | str] = {"stamp": text.strip().removesuffix(";"), "versions": self._versions}
            names |= requirements.names(Target.of(self._settings), self._settings)
            names["versions_shown"] = literal(self._versions)
            text = block(BLOCKS.stamp, names | self.order.next("not stamped")) + "\n\n"
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
        self.emit(BLOCKS.expand)

    def downgrade_expand(self) -> None:
        self.begin()
        self.emit(BLOCKS.drop_expand)

    def upgrade_backfill(self) -> None:
        self.begin(outside=True)
        self.emit(BLOCKS.backfill)
        self.end()

    def downgrade_backfill(self) -> None:
        self.begin()
        self.emit(BLOCKS.block, BLOCKS.require_ordinary)

    def upgrade_finalize(self) -> None:
        self.begin(outside=True)
        wanted = self.index()
        if isinstance(wanted, NoIndex):
            problem = build.none(self.target, wanted)
            self.emit(
                BLOCKS.block,
                BLOCKS.require,
                BLOCKS.no_index,
                level=SQL("WARNING" if wanted.wanted else "NOTICE"),
                no_index=problem.message,
                no_index_hint=problem.hint or "",
            )
        else:
            self.build_index(wanted)
        self.end()

    def build_index(self, wanted: Plan) -> None:
        single = self.settings.single_transaction
        memory = self.settings.index_memory
        options = "lists = {lists_found}" if wanted.method == "ivfflat" else wanted.options
        names: dict[str, Fragment | str] = {
            **self.index_formulas(),
            "most_memory": memory or SQL(build.BLOCKS.most_memory),
            "slower": choice.SLOWER,
            "fewer_lists": choice.FEWER_LISTS,
            "not_one_list": choice.NOT_ONE_LIST,
            "local": single,
            "given": memory or 0,
            "statement": self.formatted(
                "CREATE INDEX {concurrently}{index} ON {table} USING {method} ("
                + choice.expression(wanted.opclass, wanted.half, self.size)
                + ") WITH ("
                + options
                + ")",
                concurrently=self.concurrently,
                index=quote(self.target.index),
                method=SQL(wanted.method),
                lists_found=Argument("%2$s"),
            ),
        }
        give = BLOCKS.memory_given if memory else BLOCKS.memory
        self.emit_all(
            "\n  ".join((BLOCKS.count, give, BLOCKS.scarce)) + self._waiting(BLOCKS.drop_invalid),
            BLOCKS.drop_invalid,
            BLOCKS.create,
            BLOCKS.drop_duplicate,
            BLOCKS.report_index,
            **names,
        )
        if not single:
            self.write("RESET maintenance_work_mem;")

    def downgrade_finalize(self) -> None:
        self.begin(outside=True)
        self.emit_all(BLOCKS.require_ordinary + self._waiting(BLOCKS.drop), BLOCKS.drop)
        self.end()

    def _waiting(self, query: str) -> str:
        return "" if self.settings.single_transaction else "\n  " + _of(BLOCKS.waiting, query)

    def begin(self, *, outside: bool = False) -> None:
        """Of a step; `outside` a transaction, unless the whole script is one."""
        if outside and not self.settings.single_transaction:
            self.write(f"{BLOCKS.psql}\n\n{BLOCKS.untimed}")
        else:
            self.write(f"{opening(self.settings)} {BLOCKS.untimed_here}")
        if not self.order.number:
            scope = SQL("LOCAL" if self.settings.single_transaction else "SESSION")
            self.write(fill(BLOCKS.begun, {"scope": scope}))

    def end(self) -> None:
        """Of a step that was outside a transaction."""
        if not self.settings.single_transaction:
            self.write(BLOCKS.timed)

    @property
    def online(self) -> str:
        """What to do with a table that is not for scripts."""
        return f"Run it online: alembic {self.direction} {self.destination}." if self.destination else "Run it online."

    @property
    def concurrently(self) -> SQL:
        return SQL("" if self.settings.single_transaction else "CONCURRENTLY ")

    def index(self) -> Plan | NoIndex:
        # as if there were rows enough; the script counts them
        settings = self.settings if self.settings.index_lists else replace(self.settings, index_lists=1)
        return choice.plan(self.target, settings, Extension("public", (99,)), self.size, 10**9)

    def index_formulas(self) -> dict[str, Fragment]:
        settings = self.settings
        half = choice.on_halfvec(self.settings, self.size)
        hnsw = settings.index == "hnsw"
        lists = settings.index_lists or (1 if hnsw else 0)
        item, rows = choice.item_size(self.size, half), Formula("rows")
        return {
            "lists": SQL(f"{lists}::bigint") if lists else SQL(str(choice.lists_for(rows))),
            "lists_unused": hnsw,
            "ivfflat_kb": SQL(str(choice.kilobytes(choice.ivfflat_memory(Formula("lists"), self.size, item, rows)))),
            "hnsw_kb": SQL(str(choice.kilobytes(choice.hnsw_memory(rows, settings.index_m, item)))),
            "version": _version(choice.HALFVEC if half else choice.HNSW if hnsw else (0,)),
        }

    def emit(self, template: str, *bodies: str, **more: Fragment | str) -> None:
        names = {**self.names, **more, **self.order.next("not run")}
        names["body"] = joined("\n  ", [fill(body, names) for body in bodies])
        self.write(block(template, names))

    def emit_all(self, *parts: str, **more: Fragment | str) -> None:
        """Each part after the other: what a block does, and queries that return statements to execute."""
        queries = QUERIES.intersection(parts)
        if self.settings.single_transaction:
            self.emit(BLOCKS.block, *(_of(BLOCKS.each, part) if part in queries else part for part in parts), **more)
            return
        for part in parts:
            if part in queries:
                names = {**self.names, **more, "reached": self.order.reached}
                self.write(fill(_of(BLOCKS.gexec, part), names))
            else:
                self.emit(BLOCKS.block, part, **more)
        self.emit(BLOCKS.block, *(_of(BLOCKS.all_done, part) for part in parts if part in queries), **more)

    def sql(self, template: str, **more: Fragment) -> SQL:
        """A statement as a string constant, for EXECUTE."""
        return literal(fill(template, {**self._inner(), **more}))

    def formatted(self, template: str, **more: Fragment) -> SQL:
        """The same for EXECUTE format(), whose first argument is the extension's schema."""
        return statements.with_extension(template, self._inner(), **more)

    def _inner(self) -> dict[str, Fragment]:
        own = self.target.names()
        return {
            **own,
            "size": self.size,
            "dimensions": self.size,
            "table_text": own["table"],
            # of the vectors that are there, whatever is configured now
            "column_size": fill(
                BLOCKS.column_size,
                {"table_text": own["table"], "vector_text": self.target.vector, "vector": own["vector"]},
            ),
            "tag": FUNCTION,
        }

    @cached_property
    def names(self) -> Mapping[str, Fragment | str]:
        """What the blocks have fields for; those of one step only come with `more`."""
        target, settings, sql, formatted = self.target, self.settings, self.sql, self.formatted
        single = settings.single_transaction
        own = target.names()
        names: dict[str, Fragment | str] = {
            **own,
            "size": self.size,
            "concurrently": self.concurrently,
            "path": WHATEVER[PATH],
            "tries": tries.TRIES,
            "rest_before": SQL(
                f"least({tries.FIRST_PAUSE} * {tries.GROWTH} ^ (attempt - 1), {tries.LONGEST_PAUSE})"
                f" * ({tries.LEAST_SHARE} + random() * {1 - tries.LEAST_SHARE})"
            ),
            "lock_timeout": settings.lock_timeout_ms,
            "longer": locks.LONGER_MS,
            "most_for_autovacuum": locks.MOST_FOR_AUTOVACUUM_MS,
            "trial_timeout": interference.TRIAL["lock_timeout"],
            "accept_loss": settings.accept_loss,
            "not_a_rows": f"^({'|'.join(passes.OF_THE_SERVER + passes.NOT_A_ROWS + passes.OF_NAMES)})",
            "unless_of_a_function": f"^({'|'.join(passes.NOT_A_ROWS + passes.OF_NAMES)})",
            "batch": settings.backfill_batch,
            "pages": PAGES,
            "places": PLACES,
            "tid_of_place": _tid("place"),
            "tid_of_om_place": _tid("om.place"),
            "tid_of_end": _tid("(place + places)"),
            **requirements.names(target, settings),
            **statements.names(target, self.size),
            **build.names(target, fill("pg_catalog.to_regclass({table|literal})", own)),
            "any_options": settings.index == "ivfflat" and not settings.index_lists,
            "quoted_name": SQL(BLOCKS.quoted.replace("extension", "nspname")),
            "not_finite": NOT_FINITE,
            "fail": settings.on_bad_rows == "fail",
            "sync_trigger": settings.sync_trigger,
            "commit": SQL("") if single else fill(BLOCKS.commit, {"path": WHATEVER[PATH]}),
            # or what they refuse would fail the COMMIT
            "immediate": SQL("" if single else "\n          SET CONSTRAINTS ALL IMMEDIATE;"),
            "others_kept": "" if single else " All others are converted.",
            "table_text": str(own["table"]),
            "sync_text": target.sync,
            "source_text": target.source,
            "vector_text": target.vector,
            "label": f"backfill {target.table}: ",
            "index_comment": target.index_comment,
            "index_text": f"{own['schema']}.{quote(target.index)}",
            "count_lost": formatted(
                "SELECT count(*) FROM {table} WHERE {source} IS NULL AND {ext}.vector_dims({vector}) <> {size}"
            ),
            "count_sourceless": sql(
                "SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL AND " + STORED.without("{column_size}")
            ),
            "count_not_finite": formatted(
                "SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL AND CASE WHEN age(xmin) {which} age($1) OR "
                f"{STORED.without('{column_size}')} THEN false ELSE {STORED.not_finite} END",
                which=Argument("%1$s"),
            ),
            "not_kept": sql(" AND {vector}::text IS DISTINCT FROM {adopted}::text"),
            "write": sql(
                "UPDATE ONLY {table} SET {source} = {source} WHERE ctid = (SELECT ctid FROM ONLY {table} LIMIT 1)"
            ),
            "name_columns": interference.NAME_COLUMNS.format(table=target.names()["table"]),
            "not_carried": sql(
                "SELECT count(*) FROM {table} WHERE {adopted} IS NOT NULL AND CASE WHEN {source} IS NULL"
                " THEN {vector}::text IS DISTINCT FROM {adopted}::text ELSE {vector} IS NULL END"
            ),
            "kept_text": own["kept"],
            "kept_shown": literal(quote(target.kept)),
            "kept_comment": KEPT,
            "kept_hint": f"First put them back: {cutover_mark.UNDO}.",
            "was_swapped": cutover_mark.said(target, "swap"),
            "was_dropped": cutover_mark.said(target, "drop"),
            # the online run down refuses it as well
            "cut_over_hint": cutover_mark.UNDO_HINT if self.direction == "downgrade" else self.online,
            "online_hint": f"Scripts (--sql) are for ordinary tables of bytes. {self.online}",
        }
        names |= {
            "expand_requirements": joined(
                "\nUNION ALL\n",
                (
                    fill(f"SELECT * FROM ({block}) AS unmet", names)
                    for block in (requirements.BLOCKS.table, *requirements.OF_EXPAND)
                ),
            ),
            "holders": fill(BLOCKS.holders, {**names, "seconds": 0}),
            "long_holders": fill(BLOCKS.holders, {**names, "seconds": 1}),
            "length": fill(STORED.length, names),
            "of_length": fill(STORED.of("{size}"), names),
            "problem": fill(STORED.problem_sql("{size}"), names),
            "holds_no_number": fill(STORED.not_finite, names),
        }
        arguments = {"value": Argument("%1$s"), "same_bytes": Argument("%2$s")}
        for which, pending, value in (
            ("", STORED.pending("{size}"), "{value}"),
            ("_adopted", BLOCKS.pending_adopted.replace("{of_length}", STORED.of("{size}")), BLOCKS.value_adopted),
        ):
            names["count" + which] = sql(BLOCKS.count_pending.replace("{pending}", pending))
            for name in ("convert_pages", "count_right", "remaining"):
                text = getattr(BLOCKS, name).replace("{pending}", pending).replace("{value}", value)
                names[name + which] = formatted(text, **arguments)
        names |= {
            "same_bytes": sql("t.{source} IS NOT DISTINCT FROM batch.source"),
            "portable": sql("{convert}({source}, {size})"),
            "native": formatted(native.fit(self.size)),
            "create_convert": formatted(sync_trigger.BLOCKS.create_convert),
            "convert_no_more": fill(CONVERT.drop + ";", names),
            "create_native": formatted(";\n".join(native.JOIN.create)),
            "try_native": native.trial(ext=statements.EXT),  # in which there is no percent sign
            "native_version": _version(native.OLDEST),
            "drop_native": SQL(native.JOIN.drop + ";"),
            "may_be_native": settings.backfill_engine in (None, "native"),
            "has_to_be_native": settings.backfill_engine == "native",
        }
        return names


def _version(parts: tuple[int, ...]) -> SQL:
    """As an array of the server's."""
    return literal(f"{{{','.join(map(str, parts))}}}")


def _of(template: str, query: str) -> str:
    return template.replace("{query}", query)


def _tid(place: str) -> SQL:
    return fill(BLOCKS.tid, {"place": SQL(place), "places": PLACES})
