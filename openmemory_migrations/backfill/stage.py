"""Gives rows their vectors, or their bytes, from a binary COPY into a temporary table that keeps nothing.

Its trigger updates the rows of one group after the other, by tid and xmin, with a plan that is made once.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..db.database import Database
from ..db.keys import SUM
from ..encoding.sync_trigger import tag
from ..target import literal, quote, unquote
from .passes import OF_OVERRULED
from .reader import Way

STAGE = "openmemory_migrations_stage"
REWRITTEN = "OM002"  # SQLSTATE: to be said of a batch only with sums of what is read
# of a transaction: how many rows have got their value, and the places of those that a trigger has kept from it
COUNTER, KEPT = "openmemory_migrations.written", "openmemory_migrations.kept"
UPDATE = """
UPDATE ONLY {table} AS t SET {written} = s.element
FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.versions), pg_catalog.unnest(NEW.elements))
     AS s (tid, version, element)
WHERE t.ctid = s.tid AND t.xmin = s.version AND pg_catalog.pg_relation_filenode({table_text}::regclass) = NEW.filenode
"""
# where nobody can change what is written, to look at it again would cost a batch 5 % (measured)
COUNTED = UPDATE + "; GET DIAGNOSTICS written = ROW_COUNT"
BEFORE = """old AS MATERIALIZED (
  SELECT o.ctid AS was_at, o.{read} AS was
  FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.versions)) AS s (tid, version)
       JOIN ONLY {table} AS o ON o.ctid = s.tid AND o.xmin = s.version),
"""
# what is locked nobody else can move
LOCK = """
PERFORM FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.versions)) AS s (tid, version)
             JOIN ONLY {table} AS o ON o.ctid = s.tid AND o.xmin = s.version
WHERE pg_catalog.pg_relation_filenode({table_text}::regclass) = NEW.filenode FOR NO KEY UPDATE OF o;
GET DIAGNOSTICS chosen = ROW_COUNT;
"""
COMPARED = (
    "{lock}WITH {before} done AS ("
    + UPDATE
    + """
RETURNING t.ctid AS tid, {ok} AS ok, s.tid AS was_at, t.{read} AS now)
SELECT pg_catalog.count(*), {spoiled}, pg_catalog.array_agg(was_at), pg_catalog.array_agg(tid), {sums}
  INTO written, spoiled, were_at, are_at, sums FROM done {joined};
-- what is deferred would fire after we have looked; only now, as it may be in order at the end only
SET CONSTRAINTS ALL IMMEDIATE;
IF (SELECT pg_catalog.count(*) FROM ONLY {table} AS t WHERE t.ctid = ANY (are_at)) < pg_catalog.cardinality(are_at) THEN
  -- written once more, by a trigger AFTER it: each has to have its value and what that is from all the same
  IF sums IS NULL THEN
    RAISE 'a trigger writes rows again' USING ERRCODE = {rewritten};
  END IF;
  spoiled := spoiled IS TRUE OR pg_catalog.cardinality(were_at) > (
    SELECT pg_catalog.count(*)
    FROM (SELECT s.element, r.sum, pg_catalog.currtid2({table_text}, s.tid) AS newest
          FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.elements)) AS s (tid, element)
               JOIN ROWS FROM (pg_catalog.unnest(were_at), pg_catalog.unnest(sums)) AS r (tid, sum) ON r.tid = s.tid
          OFFSET 0) AS w JOIN ONLY {table} AS t ON t.ctid = w.newest
    WHERE pg_catalog.record_image_eq(ROW(t.{written}), ROW(w.element)) AND {sum} = w.sum);
END IF;
SET CONSTRAINTS ALL DEFERRED"""
)
# (tid, xmin) names one version of one row as long as nobody rewrites the table, which then gets another file
CREATE = (
    "CREATE TEMPORARY TABLE {stage} (filenode oid, tids tid[], versions xid[], elements {element}[])",
    """
    CREATE FUNCTION pg_temp.{stage}() RETURNS trigger LANGUAGE plpgsql AS {tag}
    #variable_conflict use_column
    DECLARE
      written bigint;
      were_at tid[];
      are_at tid[];
      sums text[];
      chosen bigint;
      others tid[];
      spoiled boolean;
    BEGIN
      {write};
      IF spoiled THEN
        RAISE 'a trigger changes the column that is read, or writes the row again' USING ERRCODE = {overruled};
      END IF;
      IF written < pg_catalog.cardinality(NEW.tids) THEN
        -- that version is still there, so nobody else has written it
        SELECT pg_catalog.array_agg(t.ctid) INTO others
        FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.versions)) AS s (tid, version)
             JOIN ONLY {table} AS t ON t.ctid = s.tid AND t.xmin = s.version
        WHERE pg_catalog.pg_relation_filenode({table_text}::regclass) = NEW.filenode;
        IF chosen > written + coalesce(pg_catalog.cardinality(others), 0) THEN
          RAISE 'a trigger deletes rows, or writes them in the place of an UPDATE' USING ERRCODE = {overruled};
        END IF;
        PERFORM pg_catalog.set_config({kept}, pg_catalog.concat(pg_catalog.current_setting({kept}, true), ' ',
          pg_catalog.translate(pg_catalog.array_to_string(others, ' '), '"', '')), true);
      END IF;
      PERFORM pg_catalog.set_config({counter}, (coalesce(nullif(pg_catalog.current_setting({counter}, true), ''), '0')
                                                ::bigint + written)::text, true);
      RETURN NULL;
    END
    {tag}
    """,
    "CREATE TRIGGER {stage} BEFORE INSERT ON pg_temp.{stage} FOR EACH ROW EXECUTE FUNCTION pg_temp.{stage}()",
    # or it would not fire where session_replication_role is replica
    "ALTER TABLE pg_temp.{stage} ENABLE ALWAYS TRIGGER {stage}",
)
# triggers that fire for our UPDATE
BESIDE = """
SELECT coalesce(bool_or(t.tgtype & 3 = 3), false), coalesce(bool_or(t.tgtype & 2 = 0), false)
FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = pg_catalog.to_regclass(:table) AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 16 <> 0
  AND (t.tgattr = CAST('' AS int2vector)
       -- one for a generated column fires where that is computed anew
       OR EXISTS (SELECT FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = t.tgrelid AND a.attnum = ANY (CAST(t.tgattr AS int2[]))
                    AND (a.attname = :written OR a.attgenerated <> '')))
"""
DROP = ("DROP TABLE pg_temp.{stage}", "DROP FUNCTION pg_temp.{stage}()")


@dataclass(frozen=True)
class Beside:
    """What others' triggers may do to the value that an UPDATE of a column writes: change the row before it is written,
    or write it again when the UPDATE is done."""

    before: bool = False
    after: bool = False


def beside(db: Database, column: str) -> Beside:
    """For the column as SQL quotes it; in a transaction."""
    ((before, after),) = db.rows(BESIDE, {"table": db.names["table"], "written": unquote(column)})
    return Beside(before, after)


class Stage:
    """Made with the first batch and dropped at the end; with every batch where a pooler may change the session."""

    def __init__(self, db: Database, ext: dict[str, str], way: Way, *, with_sums: bool = False) -> None:
        self._db = db
        self.with_sums = with_sums
        self._lasting = not db.pooled
        self._made = False
        names = {**db.names, **ext, "stage": quote(STAGE), "table_text": literal(db.names["table"])}
        names |= {"written": way.written.format_map(names), "element": way.element.format_map(names)}
        names |= {"counter": literal(COUNTER), "kept": literal(KEPT)}
        names |= {"read": way.value.format_map(names), "overruled": literal(OF_OVERRULED)}
        # a batch would take a quarter longer with them (measured)
        sum_ = SUM.format(it="pg_catalog.textsend({it}::text)")
        names |= {"sums": f"pg_catalog.array_agg({sum_.format(it='now')})" if with_sums else "NULL"}
        names |= {"sum": sum_.format(it="t." + names["read"])}
        names |= {"rewritten": literal(REWRITTEN)}
        others = beside(db, names["written"])
        names |= {"before": "", "ok": "true", "spoiled": "false", "lock": "", "joined": ""}
        if others.before:
            names |= {
                "before": BEFORE.format_map(names),
                # by bits: 0 is equal to -0
                "ok": "pg_catalog.record_image_eq(ROW(t.{written}), ROW(s.element))".format_map(names),
                "spoiled": "NOT pg_catalog.bool_and(ok AND pg_catalog.record_image_eq(ROW(was), ROW(now)))",
                "lock": LOCK.format_map(names),
                "joined": "LEFT JOIN old USING (was_at)",
            }
        names["write"] = (COMPARED if others != Beside() else COUNTED).format_map(names)
        own = ("stage", "counter", "kept", "write", "table", "table_text", "element", "overruled", *ext)
        self._names = {name: names[name] for name in own} | {"tag": tag(names.values())}

    def write(self, payload: bytes) -> tuple[int, list[str]]:
        """Writes what codec.encode() has made of rows, inside the transaction that is open.

        Returns how many rows have got their value, and the places of those that a trigger has kept as they were; a row
        that was changed or deleted since is neither.
        """
        if not self._made:
            self._run(CREATE)
        self._db.copy_in(STAGE, payload)
        if not self._lasting:
            self._run(DROP)
        ((written, kept),) = self._db.rows(
            "SELECT current_setting(:counter, true), current_setting(:kept, true)", {"counter": COUNTER, "kept": KEPT}
        )
        return int(written or 0), (kept or "").split()

    def committed(self) -> None:
        self._made = self._lasting

    def drop(self) -> None:
        if self._made and self._db.usable:
            with self._db.transaction():
                self._run(DROP)
            self._made = False

    def _run(self, statements: tuple[str, ...]) -> None:
        for statement in statements:
            self._db.run(statement, **self._names)
