"""The three steps as SQL scripts, for `alembic upgrade head --sql`: nothing is asked here, the script asks.

What differs from database to database (the extension's schema, a column that is there already, how many rows there are)
is found out by DO blocks when the script runs. It ends in the state that the online steps end in; its backfill commits
batch by batch and continues where it was. For psql: CREATE INDEX CONCURRENTLY can't be dynamic without its \\gexec.
With OM_SINGLE_TRANSACTION there is no COMMIT, no CONCURRENTLY and nothing of psql's, for runners that put all in one
transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import indexes, synctrigger
from .catalog import Extension
from .expand import EXTENSIONS_SCHEMA
from .indexes import NoIndex, Plan
from .leftovers import NOT_FINITE
from .locks import TRIES
from .settings import MAX_DIMENSIONS, Settings
from .target import OWN_COMMENT, SET_ASIDE, Target, literal, quote

EXT = '"@extension@"'  # stands, quoted, for the extension's schema until the script knows it
# a host's column may have the name of a variable: that is why every DO block has #variable_conflict
# always quoted, as the online steps write it: the text of a function is to be the same
QUOTED = """'"' || replace(extension, '"', '""') || '"'"""
TAG = "@tag@"  # the dollar quote of a DO block, chosen when its text is known
PAGES = 64  # of heap, in one batch at most: some 14,000 of the smallest rows
LOCK_FAILED = "lock_not_available OR deadlock_detected"

EXPAND = """
DO {tag}
#variable_conflict use_column
DECLARE
  extension text;
  found record;
  lost bigint;
BEGIN
  PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);
  {require_table}
  IF EXISTS (SELECT FROM {table} WHERE {source} IS NOT NULL)
     AND NOT EXISTS (SELECT FROM {table} WHERE octet_length({source}) = 4 * {size}) THEN
    RAISE EXCEPTION USING MESSAGE = {no_row},
      DETAIL = (SELECT string_agg(octets || ' bytes: ' || rows || ' rows', '; ' ORDER BY octets)
                FROM (SELECT octet_length({source}) AS octets, count(*) AS rows FROM {table} GROUP BY 1) AS lengths);
  END IF;
  {find_extension}
  IF extension IS NULL THEN
    extension := CASE WHEN to_regnamespace('{extensions}') IS NULL THEN 'public' ELSE '{extensions}' END;
    EXECUTE 'CREATE EXTENSION vector SCHEMA ' || {quoted};
  END IF;
  {find_column}
  IF found.type IS NOT NULL AND NOT found.ours THEN
    IF found.name <> 'vector' THEN
      RAISE EXCEPTION USING MESSAGE = {other_type} || found.type,
        HINT = 'Rename or drop that column: this package puts its vectors there.';
    END IF;
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = {table_text}::regclass AND attname = {adopted_text}
               AND NOT attisdropped) THEN
      RAISE EXCEPTION USING MESSAGE = {adopted_taken},
        HINT = 'Rename or drop the latter: the former is set aside under that name.';
    END IF;
    IF EXISTS (SELECT FROM pg_depend JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
               WHERE classid = 'pg_rewrite'::regclass AND refobjid = {table_text}::regclass
                 AND attname = {vector_text}) THEN
      RAISE EXCEPTION USING MESSAGE = {has_views}, HINT = 'Drop them, run the script again, and create them anew.';
    END IF;
    EXECUTE replace({count_lost}, {ext}, {quoted}) INTO lost;
    IF lost > 0 THEN
      RAISE EXCEPTION USING MESSAGE = lost || {other_dimensions};
    END IF;
  END IF;
  PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      IF found.type IS NOT NULL AND NOT found.ours THEN
        EXECUTE {rename};
        EXECUTE {set_aside} || quote_literal({set_aside_comment} || found.comment);
      END IF;
      EXECUTE replace({add}, {ext}, {quoted});
      EXECUTE {remark};{trigger}
      EXIT;
    EXCEPTION WHEN {lock_failed} THEN
      IF attempt = {tries} THEN
        RAISE;
      END IF;
      RAISE NOTICE USING MESSAGE = 'no lock on the table, try ' || attempt || ' of {tries}';
      PERFORM pg_sleep(least(0.1 * 1.5 ^ attempt, 30) * (0.5 + random() / 2));
    END;
  END LOOP;
  {find_column}
  {require_size}
END
{tag};
"""

BACKFILL = """
DO {tag}
#variable_conflict use_column
DECLARE
  extension text;
  found record;
  total bigint;
  done bigint := 0;
  moved bigint;
  page bigint;
  last_page bigint;
  pages integer := 1;
  convertible bigint;
  said timestamptz := clock_timestamp();
  passes integer := 0;
  skipped text[];
  line text;
  -- in a deadlock it is the batch that gives way, as online
  wait text := (SELECT greatest(1, least({lock_timeout}, setting::integer / 2)) || 'ms'
                FROM pg_settings WHERE name = 'deadlock_timeout');
BEGIN
  PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);
  {require_table}
  {find_extension}
  {find_column}
  IF found.type IS NULL OR NOT found.ours THEN
    RAISE EXCEPTION USING MESSAGE = {no_column};
  END IF;
  {require_size}
  EXECUTE replace({create_convert}, {ext}, {quoted});
  SELECT count(*) INTO total FROM {table} WHERE {vector} IS NULL AND octet_length({source}) = 4 * {size};
  LOOP
    passes := passes + 1;
    page := 0;
    last_page := pg_relation_size({table_text}::regclass) / current_setting('block_size')::integer;
    WHILE page < last_page LOOP
      PERFORM set_config('row_security', 'off', true), set_config('lock_timeout', wait, true),
              set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
              set_config('enable_mergejoin', 'off', true), set_config('enable_indexscan', 'off', true),
              set_config('enable_indexonlyscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
              set_config('max_parallel_workers_per_gather', '0', true);
      FOR attempt IN 1..{tries} LOOP
        BEGIN
          -- xmin: a row that changes between its conversion and its update gets nothing
          EXECUTE {convert_pages} USING ('(' || page || ',0)')::tid, ('(' || page + pages || ',0)')::tid;
          GET DIAGNOSTICS moved = ROW_COUNT;
          EXIT;
        EXCEPTION WHEN {lock_failed} THEN
          IF attempt = {tries} THEN
            RAISE;
          END IF;
          PERFORM pg_sleep(least(0.1 * 1.5 ^ attempt, 30) * (0.5 + random() / 2));
        END;
      END LOOP;
      {commit}
      page := page + pages;
      done := done + moved;
      pages := CASE WHEN moved > {batch} THEN greatest(1, pages / 2) ELSE least({pages}, pages * 2) END;
      IF clock_timestamp() - said > interval '5 seconds' THEN
        said := clock_timestamp();
        RAISE NOTICE USING MESSAGE = {label} || done || ' of ' || total || ' rows';
      END IF;
    END LOOP;
    PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);
    SELECT count(*) INTO convertible FROM {table}
     WHERE {vector} IS NULL AND octet_length({source}) = 4 * {size} AND {convert}({source}, {size}) IS NOT NULL;
    EXIT WHEN convertible = 0 OR (passes > 1 AND NOT {sync_trigger});
  END LOOP;
  RAISE NOTICE USING MESSAGE = {label} || done || ' of ' || total || ' rows';
  {find_aside}
  FOR attempt IN 1..{tries} LOOP
    EXIT WHEN found.ours IS NOT TRUE;
    BEGIN
      PERFORM set_config('lock_timeout', wait, true);
      EXECUTE {carry_over};
      EXECUTE {drop_adopted};
      EXIT;
    EXCEPTION WHEN {lock_failed} THEN
      IF attempt = {tries} THEN
        RAISE;
      END IF;
      RAISE NOTICE USING MESSAGE = 'no lock on the table, try ' || attempt || ' of {tries}';
      PERFORM pg_sleep(least(0.1 * 1.5 ^ attempt, 30) * (0.5 + random() / 2));
    END;
  END LOOP;
  SELECT array_agg(rows || ' rows can''t be converted and were skipped: ' || reason ORDER BY rows DESC)
         FILTER (WHERE reason <> 'written meanwhile'),
         sum(rows) FILTER (WHERE reason = 'written meanwhile')
    INTO skipped, convertible FROM (
      SELECT CASE WHEN octet_length({source}) = 0 THEN 'empty'
                  WHEN octet_length({source}) % 4 <> 0 THEN 'length not a multiple of 4'
                  WHEN octet_length({source}) > 4 * {most} THEN 'more than {most_shown} dimensions'
                  WHEN octet_length({source}) <> 4 * {size} THEN 'other dimension'
                  WHEN {convert}({source}, {size}) IS NULL THEN '{not_finite}'
                  ELSE 'written meanwhile' END AS reason, count(*) AS rows
      FROM {table} WHERE {vector} IS NULL AND {source} IS NOT NULL GROUP BY 1) AS left_over;{drop_convert}
  {commit}
  IF convertible > 0 THEN
    RAISE WARNING USING MESSAGE = convertible || ' rows were written during the backfill and have no vector',
      DETAIL = 'OM_SYNC_TRIGGER is off, so nothing converts what the application writes.';
  END IF;
  IF {fail} AND skipped IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = array_to_string(skipped, '; '),
      DETAIL = 'All others are converted. OM_ON_BAD_ROWS is fail.';
  END IF;
  FOREACH line IN ARRAY coalesce(skipped, '{{}}') LOOP
    RAISE WARNING USING MESSAGE = line;
  END LOOP;
END
{tag};
"""

# unless another table of the schema needs it
DROP_CONVERT = """IF NOT EXISTS (SELECT FROM pg_proc WHERE position({call} IN prosrc) > 0) THEN
        DROP FUNCTION IF EXISTS {convert}(bytea, integer);
      END IF;"""
CONVERT_PAGES = """
WITH batch AS MATERIALIZED (
  SELECT ctid AS tid, xmin AS version, {convert}({source}, {size}) AS vector FROM ONLY {table}
  WHERE ctid >= $1 AND ctid < $2 AND {vector} IS NULL AND octet_length({source}) = 4 * {size})
UPDATE ONLY {table} AS t SET {vector} = batch.vector FROM batch
WHERE t.ctid = batch.tid AND t.xmin = batch.version AND batch.vector IS NOT NULL
"""

DROP_EXPAND = """
DO {tag}
#variable_conflict use_column
DECLARE
  found record;
  aside record;
  lost bigint;
BEGIN
  PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);
  IF to_regclass({table_text}) IS NULL THEN
    RAISE WARNING USING MESSAGE = {no_table};
    RETURN;
  END IF;
  {find_aside}
  aside := found;
  {find_column}
  IF found.ours THEN
    EXECUTE {count_sourceless} || CASE WHEN aside.ours THEN {not_kept} ELSE '' END INTO lost;
    IF lost > {accept_loss} THEN
      RAISE EXCEPTION USING MESSAGE = lost || ' values have no source and would be lost',
        HINT = 'Copy them elsewhere first, or accept the loss with OM_ACCEPT_LOSS=' || lost;
    END IF;
  END IF;
  PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      {drop_trigger}
      IF found.ours THEN
        EXECUTE {drop_column};
        IF aside.ours THEN
          EXECUTE {set_aside} || coalesce(quote_literal(nullif(substr(aside.comment, {set_aside_length}), '')), 'NULL');
          EXECUTE {restore};
        END IF;
      END IF;
      EXIT;
    EXCEPTION WHEN {lock_failed} THEN
      IF attempt = {tries} THEN
        RAISE;
      END IF;
      PERFORM pg_sleep(least(0.1 * 1.5 ^ attempt, 30) * (0.5 + random() / 2));
    END;
  END LOOP;
END
{tag};
"""

REQUIRE_TABLE = """IF to_regclass({table_text}) IS NULL THEN
    RAISE EXCEPTION USING MESSAGE = {no_table};
  END IF;
  IF EXISTS (SELECT FROM pg_class WHERE oid = {table_text}::regclass AND (relkind <> 'r' OR relispartition))
     OR EXISTS (SELECT FROM pg_inherits WHERE inhparent = {table_text}::regclass) THEN
    RAISE EXCEPTION USING MESSAGE = {not_ordinary},
      HINT = 'A script migrates ordinary tables; for a partitioned one: alembic upgrade head, without --sql.';
  END IF;
  SELECT format_type(atttypid, NULL) AS type, typname AS name INTO found FROM pg_attribute
   JOIN pg_type t ON t.oid = atttypid
   WHERE attrelid = {table_text}::regclass AND attname = {source_text} AND NOT attisdropped;
  IF found.name = 'vector' THEN
    RAISE NOTICE USING MESSAGE = {already_vector};
    RETURN;
  END IF;
  IF found.type IS DISTINCT FROM 'bytea' THEN
    RAISE EXCEPTION USING MESSAGE = {no_source} || coalesce(', but of type ' || found.type, '');
  END IF;"""
REQUIRE_SIZE = """IF found.type NOT LIKE '%vector({size})' THEN
    RAISE EXCEPTION USING MESSAGE = 'column ' || {vector_shown} || ' is ' || found.type || ' already',
      HINT = 'Set OM_VEC_DIM to the dimensions that it has.';
  END IF;"""
FIND_EXTENSION = """SELECT nspname INTO extension FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace
   WHERE extname = 'vector';"""
FIND_COLUMN = """SELECT format_type(atttypid, atttypmod) AS type, typname AS name,
         typname = 'vector' AND coalesce(starts_with(col_description(attrelid, attnum), {own}), false) AS ours,
         coalesce(col_description(attrelid, attnum), '') AS comment
    INTO found FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
   WHERE attrelid = {table_text}::regclass AND attname = {vector_text} AND NOT attisdropped;"""


# where there is nothing to index, the number stays empty
COUNT = """
DO {tag}
#variable_conflict use_column
DECLARE
  found record;
BEGIN
  PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true),
          set_config('openmemory.rows', '', {local});
  {require_table}
  {find_column}
  IF found.type IS NULL OR NOT found.ours THEN
    RAISE EXCEPTION USING MESSAGE = {no_column};
  END IF;
  PERFORM set_config('openmemory.rows', (SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL)::text, {local});
END
{tag};
"""
BUILT = """
DO {tag}
BEGIN
  IF current_setting('openmemory.rows') = '' THEN
    RETURN;
  END IF;
  IF EXISTS (SELECT FROM ({ours}) AS found WHERE indexrelid = to_regclass({index_text})) THEN
    RAISE NOTICE USING MESSAGE = pg_get_indexdef(to_regclass({index_text}));
  ELSIF to_regclass({index_text}) IS NOT NULL THEN
    RAISE WARNING USING MESSAGE = {name_taken};
  ELSE
    RAISE NOTICE 'no index: too few rows for ivfflat, a pgvector that is too old for this one, or too little memory';
  END IF;
END
{tag};
"""
# what the index is built with, by the rows that are there when the script runs; without `needed` ivfflat refuses
SIZES = """
  (SELECT rows, lists, needed, CASE WHEN {lists_unused} THEN 4 * rows * ({item} + 2 * {m} * 26 + 300) / 3 + 1048576
                              ELSE needed + 4 * (samples - taken) * (lists + 2) + 8 * lists + 1048576
                         END / 1024 + 1 AS memory
   FROM (SELECT *, (samples + 2 * lists) * {item} + 4 * lists * {size} + 4 * taken * (lists + 2) + 8 * lists * lists
                   AS needed
         FROM (SELECT *, greatest({rows_a_list} * lists, {samples}) AS samples,
                      least(rows, greatest({rows_a_list} * lists, {samples})) AS taken
               FROM (SELECT rows, {lists} AS lists
                     FROM (SELECT nullif(current_setting('openmemory.rows'), '')::bigint AS rows) AS c) AS l) AS s)
   AS n)
"""
LISTS = (
    "least(CASE WHEN rows <= 1000000 THEN greatest(1, rows / 1000) ELSE floor(sqrt(rows))::bigint END, rows / {least})"
)
MEMORY = """
SELECT set_config('maintenance_work_mem', greatest(given, least(memory, borne)) || 'kB', {local}) FROM {sizes} AS sizes,
  (SELECT pg_size_bytes(current_setting('maintenance_work_mem')) / 1024 AS given,
          pg_size_bytes(current_setting('shared_buffers')) / 1024 AS borne) AS server
WHERE rows IS NOT NULL;
"""
CREATE = """
SELECT replace(replace({statement}, {ext}, {quoted_name}), '@lists@', lists::text)
FROM {sizes} AS sizes, pg_extension JOIN pg_namespace n ON n.oid = extnamespace
WHERE extname = 'vector' AND to_regclass({index_text}) IS NULL AND rows IS NOT NULL AND lists > 0
  AND ({lists_unused} OR needed <= pg_size_bytes(current_setting('maintenance_work_mem')))
  AND string_to_array(regexp_replace(extversion, '[^0-9.]', '', 'g'), '.')::integer[] >= {version}
"""
EACH = """
DO {tag}
#variable_conflict use_column
DECLARE
  statement text;
BEGIN
  FOREACH statement IN ARRAY ARRAY({query}) LOOP
    EXECUTE statement;
  END LOOP;
END
{tag};
"""
# those that may be ours, under either name
OURS = """
  SELECT indexrelid, indisvalid, indclass::text, indkey::text, pg_get_expr(indexprs, indrelid) AS expression, reloptions
  FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_am am ON am.oid = relam
  WHERE indexrelid IN (to_regclass({index_text}), to_regclass({mirrored_text}))
    AND indrelid = to_regclass({table_text}) AND amname IN ('ivfflat', 'hnsw')
"""
DROP = "SELECT 'DROP INDEX {concurrently}' || found.indexrelid::regclass FROM ({ours}) AS found"
DROP_INVALID = DROP + " WHERE NOT indisvalid"
DROP_DUPLICATE = (
    DROP
    + """ JOIN ({ours}) AS built USING (indclass, indkey)
WHERE found.indexrelid = to_regclass({mirrored_text}) AND built.indexrelid = to_regclass({index_text})
  AND found.expression IS NOT DISTINCT FROM built.expression
  AND ({any_options} OR found.reloptions IS NOT DISTINCT FROM built.reloptions)"""
)


@dataclass(frozen=True)
class Script:
    """Writes one step after the other to the script that Alembic prints, through `write`."""

    target: Target
    settings: Settings
    size: int
    write: Callable[[str], None]

    def upgrade_expand(self) -> None:
        self._emit(EXPAND)

    def downgrade_expand(self) -> None:
        self._emit(DROP_EXPAND)

    def upgrade_backfill(self) -> None:
        self._stop_at_errors()
        self._emit(BACKFILL)

    def upgrade_finalize(self) -> None:
        wanted = self._index()
        if isinstance(wanted, NoIndex):
            self.write(f"-- no index: {wanted.reason}")
            return
        single = self.settings.single_transaction
        sizes = SIZES.format_map(self._names() | self._rules())
        names = {**self._rules(), "sizes": sizes, "local": "true" if single else "false"}
        self._stop_at_errors()
        self._emit(COUNT, **names)
        if not single:
            self.write("SET lock_timeout = '1h'; SET statement_timeout = 0;")
        if self.settings.index_memory:
            self.write(f"SET {'LOCAL ' if single else ''}maintenance_work_mem = '{self.settings.index_memory}kB';")
        else:
            self._emit(MEMORY, **names)
        statement = (
            f"CREATE INDEX {self._concurrently}{quote(self.target.index)} ON {self.target.names()['table']}"
            f" USING {wanted.method} ({wanted.expression})"
            f" WITH ({'lists = @lists@' if wanted.method == 'ivfflat' else wanted.options})"
        )
        self._emit_each(DROP_INVALID)
        self._emit_each(CREATE, **names, statement=literal(statement))
        self._emit_each(DROP_DUPLICATE, any_options=wanted.method == "ivfflat" and not self.settings.index_lists)
        if not single:
            self.write("RESET lock_timeout; RESET statement_timeout; RESET maintenance_work_mem;")
        self._emit(BUILT)

    def downgrade_finalize(self) -> None:
        self._stop_at_errors()
        self._emit_each(DROP)

    def _stop_at_errors(self) -> None:
        """Outside a transaction psql would go on after an error, to the stamp, unless it was told otherwise."""
        if not self.settings.single_transaction:
            self.write("\\set ON_ERROR_STOP on")

    @property
    def _concurrently(self) -> str:
        return "" if self.settings.single_transaction else "CONCURRENTLY "

    def _index(self) -> Plan | NoIndex:
        # as if there were rows enough; the script counts them
        settings = self.settings if self.settings.index_lists else replace(self.settings, index_lists=1)
        extension = Extension(EXT.strip('"'), (99,))
        return indexes.plan(self.target, settings, extension, self.size, 10**9)

    def _rules(self) -> dict[str, Any]:
        settings = self.settings
        half = self.size > indexes.INDEX_DIMENSIONS
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

    def _emit(self, template: str, **more: Any) -> None:
        names = {**self._names(), **more}
        body = template.format_map(names)
        tag = "$script$"
        while tag in body:
            tag = f"{tag[:-1]}_$"
        self.write(body.replace(TAG, tag).strip())

    def _emit_each(self, query: str, **more: Any) -> None:
        """Has every statement executed that the query returns."""
        if not self.settings.single_transaction:
            self._emit(query.rstrip() + "\n\\gexec", **more)
            return
        # all of them first: a query that is still being read keeps its table from CREATE INDEX
        self._emit(EACH.replace("{query}", query), **more)

    def _names(self) -> dict[str, Any]:
        target, settings = self.target, self.settings
        own = target.names()
        inner = {**own, "ext": EXT, "size": str(self.size), "dimensions": str(self.size)}
        inner["tag"] = synctrigger.tag(inner.values())

        def sql(template: str) -> str:
            return literal(template.strip("\n").format_map(inner))

        trigger = [sql(synctrigger.CREATE_CONVERT), sql(synctrigger.CREATE_SYNC)]
        drop_convert = DROP_CONVERT.format(call=literal(own["convert"] + "("), convert=own["convert"])
        names: dict[str, Any] = {
            **own,
            "tag": TAG,
            "size": self.size,
            "most": MAX_DIMENSIONS,
            "most_shown": f"{MAX_DIMENSIONS:,}",
            "concurrently": self._concurrently,
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
            "already_vector": literal(
                f"column {quote(target.source)} of {target} is of type vector already, nothing to do"
            ),
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
            "create_convert": trigger[0],
            "drop_convert": "" if settings.sync_trigger else "\n  " + drop_convert,
            "drop_trigger": f"""DROP TRIGGER IF EXISTS {own["sync"]} ON {own["table"]};
      DROP FUNCTION IF EXISTS {own["sync_function"]}();
      {drop_convert}""",
            "trigger": "",
        }
        if settings.sync_trigger:
            more = (
                sql("REVOKE ALL ON FUNCTION {sync_function}() FROM PUBLIC"),
                sql(synctrigger.CREATE_TRIGGER),
                sql("COMMENT ON TRIGGER {sync} ON {table} IS {comment}"),
            )
            lines = [f"EXECUTE replace({text}, {literal(EXT)}, {QUOTED});" for text in (*trigger, *more)]
            names["trigger"] = "\n      " + "\n      ".join(lines)
        for name, part in (
            ("require_table", REQUIRE_TABLE),
            ("find_extension", FIND_EXTENSION),
            ("find_column", FIND_COLUMN),
            ("require_size", REQUIRE_SIZE),
            ("ours", OURS),
        ):
            names[name] = part.format_map(names)
        aside = {"own": literal(SET_ASIDE), "vector_text": names["adopted_text"]}
        names["find_aside"] = FIND_COLUMN.format_map(names | aside)
        return names
