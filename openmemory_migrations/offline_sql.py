"""The SQL of the scripts: DO blocks that find out, when they run, what the online steps ask the catalogs.

Every `{name}` is filled by offline.Script. Texts are frozen with the first release.
"""

from __future__ import annotations

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
    {again}
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
  {require_column}
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
    {again}
  END LOOP;
  SELECT array_agg(rows || ' rows can''t be converted and were skipped: ' || reason ORDER BY rows DESC)
         FILTER (WHERE reason <> 'written meanwhile'),
         sum(rows) FILTER (WHERE reason = 'written meanwhile')
    INTO skipped, convertible FROM (
      SELECT {reason} AS reason, count(*) AS rows
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

REASON = """CASE WHEN octet_length({source}) = 0 THEN 'empty'
                  WHEN octet_length({source}) % 4 <> 0 THEN 'length not a multiple of 4'
                  WHEN octet_length({source}) > 4 * {most} THEN 'more than {most_shown} dimensions'
                  WHEN octet_length({source}) <> 4 * {size} THEN 'other dimension'
                  WHEN {convert}({source}, {size}) IS NULL THEN '{not_finite}'
                  ELSE 'written meanwhile' END"""
# the end of a try, in the loop over `attempt`
AGAIN = """EXCEPTION WHEN {lock_failed} THEN
      IF attempt = {tries} THEN
        RAISE;
      END IF;
      RAISE NOTICE USING MESSAGE = 'no lock on the table, try ' || attempt || ' of {tries}';
      PERFORM pg_sleep(least(0.1 * 1.5 ^ attempt, 30) * (0.5 + random() / 2));
    END;"""
# unless another table of the schema needs it
DROP_CONVERT = """IF NOT EXISTS (SELECT FROM pg_proc WHERE position({call} IN prosrc) > 0) THEN
        DROP FUNCTION IF EXISTS {function};
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
  {require_ordinary}
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
      -- of a cutover that was interrupted and never resumed; its other preparations go along
      IF {kept_exists} THEN
        LOCK TABLE {kept} IN ACCESS EXCLUSIVE MODE;
        IF EXISTS (SELECT FROM {kept}) THEN
          RAISE EXCEPTION USING MESSAGE = {kept_away}, HINT = {kept_hint};
        END IF;
        DROP TABLE {kept};
      END IF;
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

KEPT_EXISTS = "coalesce(starts_with(obj_description(to_regclass({kept_text}), 'pg_class'), {kept_comment}), false)"
# what scripts don't do, in either direction: the first block of each step has it, before any change, as nobody has
# looked at the table when a script is printed. There is nothing to refuse where there is no table
REQUIRE_ORDINARY = """SELECT CASE attname WHEN {source_text} THEN {was_swapped} ELSE {was_dropped} END AS what
    INTO found FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
   WHERE attrelid = to_regclass({table_text}) AND attname IN ({source_text}, {vector_text}) AND NOT attisdropped
     AND typname = 'vector' AND starts_with(col_description(attrelid, attnum), {mark_comment});
  IF found.what IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = found.what, HINT = {cut_over_hint};
  END IF;
  SELECT CASE WHEN relkind = 'p' THEN {is_partitioned}
              WHEN relispartition THEN {is_partition}
              WHEN EXISTS (SELECT FROM pg_inherits WHERE inhrelid = c.oid) THEN {is_child}
              WHEN EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) THEN {is_parent}
              WHEN relkind <> 'r' THEN {not_ordinary}
              WHEN EXISTS (SELECT FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
                           WHERE attrelid = c.oid AND attname = {source_text} AND NOT attisdropped
                             AND typname = 'vector') THEN {is_vector}
         END AS what INTO found FROM pg_class c WHERE c.oid = to_regclass({table_text});
  IF to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN
    IF EXISTS (SELECT FROM pg_catalog.pg_dist_partition WHERE logicalrelid = to_regclass({table_text})) THEN
      SELECT {is_distributed} AS what INTO found;
    END IF;
  END IF;
  IF found.what IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = found.what, HINT = {online_hint};
  END IF;"""
REFUSE = """
DO {tag}
DECLARE
  found record;
BEGIN
  {require_ordinary}
END
{tag};
"""
REQUIRE_TABLE = """IF to_regclass({table_text}) IS NULL THEN
    RAISE EXCEPTION USING MESSAGE = {no_table};
  END IF;
  {require_ordinary}
  SELECT format_type(atttypid, NULL) AS type INTO found FROM pg_attribute
   WHERE attrelid = {table_text}::regclass AND attname = {source_text} AND NOT attisdropped;
  IF found.type IS DISTINCT FROM 'bytea' THEN
    RAISE EXCEPTION USING MESSAGE = {no_source} || coalesce(', but of type ' || found.type, '');
  END IF;"""
REQUIRE_COLUMN = """{find_column}
  IF found.type IS NULL OR NOT found.ours THEN
    RAISE EXCEPTION USING MESSAGE = {no_column};
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

REQUIRE = """
DO {tag}
DECLARE
  found record;
BEGIN
  {require_table}
  {require_column}
END
{tag};
"""
COUNT = """
DO {tag}
#variable_conflict use_column
DECLARE
  found record;
BEGIN
  PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);
  {require_table}
  {require_column}
  PERFORM set_config('openmemory.rows', (SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL)::text, {local});
END
{tag};
"""
BUILT = """
DO {tag}
BEGIN
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
                     FROM (SELECT current_setting('openmemory.rows')::bigint AS rows) AS c) AS l) AS s)
   AS n)
"""
LISTS = (
    "least(CASE WHEN rows <= 1000000 THEN greatest(1, rows / 1000) ELSE floor(sqrt(rows))::bigint END, rows / {least})"
)
MEMORY = """
SELECT set_config('maintenance_work_mem', greatest(given, least(memory, borne)) || 'kB', {local}) FROM {sizes} AS sizes,
  (SELECT pg_size_bytes(current_setting('maintenance_work_mem')) / 1024 AS given,
          pg_size_bytes(current_setting('shared_buffers')) / 1024 AS borne) AS server;
"""
CREATE = """
SELECT replace(replace({statement}, {ext}, {quoted_name}), '@lists@', lists::text)
FROM {sizes} AS sizes, pg_extension JOIN pg_namespace n ON n.oid = extnamespace
WHERE extname = 'vector' AND to_regclass({index_text}) IS NULL AND lists > 0
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
