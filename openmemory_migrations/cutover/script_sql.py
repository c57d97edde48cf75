"""The SQL of the cutover's scripts: what `forward` and `restore` do, as DO blocks that find out for themselves.

Every `{name}` is filled by cutover.script. What depends on the table's primary key, or on which way it was cut over, is
only known when the script runs and stands between two @ until then. Texts are frozen with the first release.
"""

from __future__ import annotations

# quoted, as it stands in the statements: the column of vectors of a table that was cut over, `v` or `v_vector`
NOW = '"@vector@"'

BEGIN = """
DO {tag}
#variable_conflict use_column
DECLARE
  extension text;
  found record;
"""
ALL_ROWS = "PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);"

# what gate.require asks; `say` is how loud a script is that has nothing to do
GATE = """{require_ordinary}
  {find_mark}
  IF found.mark ->> 'mode' <> '{mode}' THEN
    RAISE EXCEPTION USING MESSAGE = {said_cut_over}, HINT = 'For {mode} first undo that: {undo}.';
  ELSIF found.mark IS NOT NULL THEN
    RAISE {say} USING MESSAGE = {said_cut_over} || '; nothing to do';
    RETURN;
  END IF;
  SELECT typname AS name, format_type(atttypid, NULL) AS type INTO found
    FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
   WHERE attrelid = {table_text}::regclass AND attname = {source_text} AND NOT attisdropped;
  IF found.name = 'vector' THEN
    RAISE {say} USING MESSAGE = {already_cut_over};
    RETURN;
  ELSIF found.type IS DISTINCT FROM 'bytea' THEN
    RAISE EXCEPTION USING MESSAGE = {no_source} || coalesce(', but of type ' || found.type, '');
  END IF;
  {find_aside}
  IF found.ours THEN
    RAISE EXCEPTION USING MESSAGE = {not_ended}, HINT = 'First: alembic upgrade head.';
  END IF;
  {find_column}
  IF found.ours IS NOT TRUE THEN
    RAISE EXCEPTION USING MESSAGE = {no_column}, HINT = 'First: alembic upgrade head.';
  ELSIF found.type NOT LIKE '%)' THEN
    RAISE EXCEPTION USING MESSAGE = {no_dimensions}, HINT = {anew};
  END IF;
  {require_size}
  IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {table_text}::regclass AND tgname = {sync_text}
                 AND NOT tgisinternal AND tgenabled IN ('O', 'A')) THEN
    RAISE EXCEPTION USING MESSAGE = {no_trigger}, HINT = {enable_trigger};
  END IF;
  SELECT string_agg(what, '; ') AS what INTO found FROM ({dependents}) AS d (what);
  IF found.what IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = {hangs} || found.what,
      HINT = 'Drop it, and create it anew after the cutover for what is there then.';
  END IF;
  IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = {table_text}::regclass AND attname = {archive_text}
             AND NOT attisdropped) THEN
    RAISE EXCEPTION USING MESSAGE = {archive_taken},
      HINT = 'Rename or drop it: the bytes are kept there, or put back from there.';
  END IF;
  IF to_regclass({kept_text}) IS NOT NULL AND NOT {kept_exists} THEN
    RAISE EXCEPTION USING MESSAGE = {kept_taken}, HINT = 'Rename that.';
  END IF;"""

CHECK = (
    BEGIN
    + """BEGIN
  {all_rows}
  {gate}
  FOR found IN SELECT pubname FROM ({publications}) AS p LOOP
    RAISE WARNING USING MESSAGE = 'publication "' || found.pubname || '"' || {publishes},
      DETAIL = 'One whose table has still the columns of before stops with an error at the first row after that.',
      HINT = 'Cut its table over as well before its next row, or take the table out of the publication.';
  END LOOP;
  IF {index_possible} AND NOT EXISTS (
       SELECT FROM pg_index i JOIN pg_class c ON c.oid = indexrelid JOIN pg_am am ON am.oid = c.relam
              JOIN pg_opclass op ON op.oid = indclass[0]
              JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = indexrelid AND d.refobjid = indrelid
              JOIN pg_attribute ON attrelid = indrelid AND attnum = d.refobjsubid
       WHERE indrelid = {table_text}::regclass AND attname = {vector_text} AND indisvalid AND indisready
         AND indpred IS NULL AND amname IN ('ivfflat', 'hnsw')
         AND opcname IN ('vector_l2_ops', 'vector_cosine_ops', 'vector_ip_ops',
                         'halfvec_l2_ops', 'halfvec_cosine_ops', 'halfvec_ip_ops')) THEN
    SELECT count(*) AS rows INTO found FROM {table} WHERE {vector} IS NOT NULL;
    IF found.rows >= {least_rows}
       AND EXISTS (SELECT FROM pg_extension WHERE extname = 'vector' AND
                   string_to_array(regexp_replace(extversion, '[^0-9.]', '', 'g'), '.')::integer[] >= {version}) THEN
      RAISE EXCEPTION USING MESSAGE = {no_index}, DETAIL = 'Searches would read every row.', HINT = {no_index_hint};
    END IF;
  END IF;
END
{tag};
"""
)

FIND_KEY = """SELECT string_agg(quote_ident(attname), ', ' ORDER BY place) AS keys,
         string_agg('t.' || quote_ident(attname) || ' = k.' || quote_ident(attname), ' AND ' ORDER BY place) AS same,
         coalesce('concat_ws('', '', ' || string_agg('concat(' || quote_literal(attname || '=') || ', t.'
                                                     || quote_ident(attname) || ')', ', ' ORDER BY place) || ')',
                  'concat(''ctid='', t.ctid)') AS shown
    INTO pk FROM pg_index, unnest(indkey) WITH ORDINALITY AS u (attnum, place) JOIN pg_attribute a USING (attnum)
   WHERE indrelid = {table_text}::regclass AND indisprimary AND a.attrelid = indrelid;"""

# one snapshot; LATERAL … OFFSET 0 has each value converted once
COMPARE = """
SELECT coalesce(sum(rows), 0) AS rows, coalesce(sum(rows) FILTER (WHERE state = 'equal'), 0) AS equal,
       coalesce(sum(rows) FILTER (WHERE state = 'none'), 0) AS without,
       coalesce(sum(rows) FILTER (WHERE state = 'skipped'), 0) AS skipped,
       coalesce(sum(rows) FILTER (WHERE state = 'wrong'), 0) AS wrong,
       coalesce(string_agg(reason || ': ' || rows, '; ' ORDER BY rows DESC) FILTER (WHERE state = 'skipped'), '')
         AS reasons,
       string_agg(rows || ': ' || reason || ', such as (' || example || ')', '; ') FILTER (WHERE state = 'wrong')
         AS details
FROM (
  SELECT state, reason, count(*) AS rows, min(example) AS example
  FROM (SELECT openmemory_state AS state, openmemory_reason AS reason,
               CASE WHEN openmemory_state = 'wrong' THEN @shown@ END AS example
        FROM {table} AS t
             CROSS JOIN LATERAL (SELECT {convert}(t.{source}, {size}) AS openmemory_made OFFSET 0) AS made
             CROSS JOIN LATERAL (
               SELECT CASE WHEN t.{source} IS NULL THEN 'none'
                           WHEN openmemory_made IS NULL AND t.{vector} IS NULL THEN 'skipped'
                           WHEN {ext}.vector_send(openmemory_made) IS DISTINCT FROM {ext}.vector_send(t.{vector})
                             THEN 'wrong'
                           ELSE 'equal' END AS openmemory_state) AS state
             CROSS JOIN LATERAL (
               SELECT CASE WHEN openmemory_state = 'skipped' THEN {reason}
                           WHEN openmemory_state = 'wrong' AND openmemory_made IS NULL THEN {stale}
                           WHEN openmemory_state = 'wrong' AND t.{vector} IS NULL THEN {missing}
                           WHEN openmemory_state = 'wrong' THEN {differs} END AS openmemory_reason) AS reason) AS seen
  GROUP BY 1, 2) AS counted
"""
REQUIRE_ACCEPTED = """IF skipped > 0 AND skipped <> {accept_loss} THEN
    RAISE EXCEPTION USING MESSAGE = skipped || {unfit},
      DETAIL = coalesce(reasons, 'They were written just now') || '. OM_ACCEPT_LOSS says {accept_loss}.',
      HINT = 'Mend or delete them, or leave them without a vector with OM_ACCEPT_LOSS=' || skipped || {are_kept};
  ELSIF skipped > 0 AND pk.keys IS NULL THEN
    RAISE EXCEPTION USING MESSAGE = {no_key}, HINT = 'Give it one, or mend or delete the rows without a vector.';
  END IF;"""
REQUIRE_VALUES = """IF found.not_null THEN
    EXECUTE {count_nulls} INTO nulls;
    IF nulls > 0 THEN
      RAISE EXCEPTION USING MESSAGE = nulls || {nulls_shown}, HINT = 'Delete or mend them.';
    END IF;
  END IF;"""
NOT_NULL_OF_SOURCE = """SELECT attnotnull AS not_null INTO found FROM pg_attribute
   WHERE attrelid = {table_text}::regclass AND attname = {source_text} AND NOT attisdropped;"""
VERIFY = (
    BEGIN
    + """  pk record;
  skipped bigint;
  reasons text;
  nulls bigint;
BEGIN
  {all_rows}
  {gate_again}
  {find_key}
  {find_extension}
  -- what is wrong may just have been about to be put right: a second look, in a new snapshot
  FOR look IN 1..2 LOOP
    EXECUTE replace(replace({compare}, {ext}, {quoted}), '@shown@', pk.shown) INTO found;
    EXIT WHEN found.wrong = 0;
  END LOOP;
  IF found.wrong > 0 THEN
    RAISE EXCEPTION USING MESSAGE = found.wrong || {wrong}, DETAIL = found.details || '.', HINT = {mend};
  END IF;
  RAISE NOTICE USING MESSAGE = {verified} || found.rows || ' rows, ' || found.equal || ' equal, ' || found.skipped
    || ' that no vector can hold, ' || found.without || ' without bytes';
  skipped := found.skipped;
  reasons := nullif(found.reasons, '');
  {require_accepted}
  {not_null_of_source}
  {require_values}
END
{tag};
"""
)

# under it everything that follows is sure of its rows
LOCK = """
-- in one transaction the table is locked from here to the end: nobody reads or writes it meanwhile, and the rows
-- without a vector are found by reading it
DO {tag}
BEGIN
  IF {left_to_do} THEN
    PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
    FOR attempt IN 1..{tries} LOOP
      BEGIN
        LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;
        EXIT;
      {again}
    END LOOP;
  END IF;
END
{tag};
"""
# whether this script has something to do: not where it was interrupted after its switch, or says that it has nothing
TO_CUT_OVER = """EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass({table_text}) AND attname = {vector_text}
                 AND NOT attisdropped AND starts_with(col_description(attrelid, attnum), {own}))"""
TO_UNDO = "{mark} IS NOT NULL"

IS_LEFT = "(SELECT FROM pg_index WHERE indexrelid = to_regclass({left_text}) AND indrelid = to_regclass({table_text}))"
# a valid one is of a run that was interrupted; to drop it would wait for whoever reads the table
IS_READY = "(SELECT FROM pg_index WHERE indexrelid = to_regclass({left_text}) AND indisvalid AND indisready)"
DROP_LEFT = """
SELECT 'DROP INDEX CONCURRENTLY ' || {left_text} WHERE {to_cut_over} AND EXISTS {is_left} AND NOT EXISTS {is_ready}
"""
INDEX_LEFT = "SELECT {create_left} WHERE {to_cut_over} AND NOT (EXISTS {is_left} AND EXISTS {is_ready})"

# the index that newer OpenMemory would make, where it is there under our name
RENAMED = """(SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = indexrelid JOIN pg_am am ON am.oid = c.relam
          JOIN pg_opclass op ON op.oid = indclass[0] JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
   WHERE indexrelid = to_regclass({index_text}) AND indrelid = to_regclass({table_text}) AND attname = {vector_text}
     AND indisvalid AND indisready AND indpred IS NULL AND amname = 'hnsw' AND opcname = 'vector_cosine_ops'
     AND {has_newer} AND to_regclass({newer_text}) IS NULL
     AND coalesce((SELECT option_value FROM pg_options_to_table(reloptions) WHERE option_name = 'm'), '16') = '{m}'
     AND coalesce((SELECT option_value FROM pg_options_to_table(reloptions) WHERE option_name = 'ef_construction'),
                  '64') = '{ef_construction}')"""
UNLESS_RENAMED = """
  IF {renamed} IS NOT NULL THEN
    RETURN;
  END IF;"""

FILL_KEPT = """IF NOT {kept_exists} THEN
          EXECUTE replace({create_kept}, '@keys@', pk.keys);
          EXECUTE replace({key_of_kept}, '@keys@', pk.keys);
          EXECUTE {hide_kept};
          EXECUTE {comment_kept};
        END IF;
        EXECUTE replace({copy_kept}, '@keys@', pk.keys);
        EXECUTE replace({clean_kept}, '@same@', pk.same);"""
KEEP = (
    BEGIN
    + """  pk record;
  skipped bigint;
  reasons text;
BEGIN
  {all_rows}
  {gate_again}
  {find_key}
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      PERFORM set_config('enable_seqscan', 'off', true), set_config('lock_timeout', '{lock_timeout}ms', true);
      EXECUTE {count_left} INTO skipped;
      {require_accepted}
      IF skipped > 0 THEN
        {fill_kept}
      END IF;
      EXIT;
    {again}
  END LOOP;
END
{tag};
"""
)

# by which SET NOT NULL needn't read the table
PROVE = (
    BEGIN
    + """{variables}  nulls bigint;
BEGIN
  {all_rows}
  {whether_not_null}
  IF found.not_null IS NOT TRUE THEN
    RETURN;
  END IF;
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
      {unprove}
      EXECUTE {prove};
      EXIT;
    {again}
  END LOOP;
  COMMIT;
  {all_rows}
  BEGIN
    ALTER TABLE {table} VALIDATE CONSTRAINT {left};
    RETURN;
  EXCEPTION WHEN check_violation THEN
    NULL;
  END;
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
      {unprove}
      EXIT;
    {again}
  END LOOP;
  COMMIT;
  {require_values}
  RAISE EXCEPTION 'a row without a value came and went: run the same script again';
END
{tag};
"""
)
WHETHER_NOT_NULL = """{gate_again}
  {not_null_of_source}"""
WHETHER_NOT_NULL_BACK = """{gate_back}
  SELECT marked -> 'source' ->> 'not_null' = 'true' AS not_null INTO found;"""
UNPROVE = """IF EXISTS (SELECT FROM pg_constraint
                 WHERE conrelid = {table_text}::regclass AND conname = {left_name}) THEN
        ALTER TABLE {table} DROP CONSTRAINT {left};
      END IF;"""

# as Attributes.as_data() by json.dumps(sort_keys=True)
ATTRIBUTES = """(SELECT '{{"comment": ' || coalesce(to_json(col_description(a.attrelid, attnum))::text, 'null')
         || ', "compression": ' || to_json(attcompression::text)
         || ', "default": ' || coalesce(to_json(pg_get_expr(adbin, adrelid))::text, 'null')
         || ', "grants": [' || coalesce((SELECT string_agg('[' || coalesce(to_json(role)::text, 'null') || ', '
              || to_json(privilege) || ', ' || grantable || ']', ', ' ORDER BY role NULLS FIRST, privilege)
              FROM {grants} AS g), '')
         || '], "not_null": ' || attnotnull || ', "statistics": ' || coalesce(attstattarget::text, 'null')
         || ', "storage": ' || to_json(attstorage::text) || '}}'
       FROM pg_attribute a LEFT JOIN pg_attrdef ON adrelid = a.attrelid AND adnum = attnum
       WHERE a.attrelid = {table_text}::regclass AND attname = {column_text} AND NOT attisdropped)"""
GRANTS = """(SELECT (CASE grantee WHEN 0 THEN NULL ELSE pg_get_userbyid(grantee) END)::text COLLATE "C" AS role,
                      privilege_type AS privilege, is_grantable AS grantable
               FROM pg_attribute, aclexplode(attacl)
               WHERE attrelid = {table_text}::regclass AND attname = {column_text} AND NOT attisdropped)"""
GRANTS_OF_MARK = """(SELECT (one ->> 0) COLLATE "C" AS role, one ->> 1 AS privilege, (one ->> 2)::boolean AS grantable
               FROM json_array_elements(marked -> 'source' -> 'grants') AS one
               WHERE one ->> 0 IS NULL OR EXISTS (SELECT FROM pg_roles WHERE rolname = one ->> 0))"""
# the statements by which a column that has the privileges `present` gets those that are `wanted`, as switching.grant
EXCHANGE = """SELECT coalesce(array_agg(line ORDER BY place, role NULLS FIRST, privilege), '{{}}') FROM (
          SELECT 1 AS place, role, privilege, 'REVOKE ' || privilege || {on_column} || ' FROM '
                 || coalesce(quote_ident(role), 'PUBLIC') || ' CASCADE' AS line
          FROM ({present} EXCEPT {wanted}) AS r
          UNION ALL
          SELECT 2, role, privilege, 'GRANT ' || privilege || {on_column} || ' TO '
                 || coalesce(quote_ident(role), 'PUBLIC') || CASE WHEN grantable THEN ' WITH GRANT OPTION' ELSE '' END
          FROM ({wanted} EXCEPT {present}) AS g) AS lines"""

SWITCH = (
    BEGIN
    + """  pk record;
  skipped bigint;
  reasons text;
  marked text;
  renamed text;
  was_not_null boolean;
  had_default boolean;
  lines text[];
  line text;
BEGIN
  {all_rows}
  {gate_again}
  {find_key}
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
      LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;
      {gate_again}
      PERFORM set_config('enable_seqscan', 'off', true);
      EXECUTE {count_left} INTO skipped;
      {require_accepted}
      IF skipped > 0 THEN
        {fill_kept}
      END IF;
      SELECT attnotnull, atthasdef INTO was_not_null, had_default FROM pg_attribute
       WHERE attrelid = {table_text}::regclass AND attname = {source_text};
      renamed := {renamed};
      marked := {mark_comment} || '{{"mode": "{mode}", "parts": {{}}, "renamed": '
        || coalesce(to_json(renamed)::text, 'null') || ', "source": ' || {attributes_of_source}
        || ', "vector": ' || {attributes_of_vector} || '}}';
      {drop_trigger}
      IF EXISTS {is_left} THEN
        EXECUTE 'DROP INDEX ' || {left_text};
      END IF;
      {change}
      EXIT;
    {again}
  END LOOP;
  RAISE NOTICE USING MESSAGE = {was_cut_over}, DETAIL = {no_more_bytes}, HINT = 'The way back: {undo}.';
END
{tag};
"""
)
TO_DROP = """ALTER TABLE {table} DROP COLUMN {source};
      EXECUTE {comment_vector} || quote_literal(marked);"""
TO_SWAP = """lines := ({grants_to_source}) || ({grants_to_archive});
      IF was_not_null THEN
        ALTER TABLE {table} ALTER COLUMN {source} DROP NOT NULL;
      END IF;
      IF had_default THEN
        ALTER TABLE {table} ALTER COLUMN {source} DROP DEFAULT;
      END IF;
      ALTER TABLE {table} RENAME COLUMN {source} TO {archive};
      ALTER TABLE {table} RENAME COLUMN {vector} TO {source};
      FOREACH line IN ARRAY lines LOOP
        EXECUTE line;
      END LOOP;
      IF was_not_null THEN
        ALTER TABLE {table} ALTER COLUMN {source} SET NOT NULL;
      END IF;
      {unprove}
      EXECUTE {comment_source} || quote_literal(marked);
      EXECUTE {create_forgetting};
      EXECUTE {revoke_back};
      EXECUTE {forgetting};
      IF renamed IS NOT NULL THEN
        ALTER INDEX {schema}.{index} RENAME TO {newer};
      END IF;"""

# the way back. `now` is the column of vectors as long as the table is cut over
VARIABLES_BACK = """  marked json;
  now text;
"""
BEGIN_BACK = BEGIN + VARIABLES_BACK
GATE_BACK = """{require_ordinary}
  marked := {mark};
  IF marked IS NULL THEN
    RAISE {say} USING MESSAGE = {not_cut};
    RETURN;
  END IF;
  now := CASE marked ->> 'mode' WHEN 'swap' THEN {source_shown} ELSE {vector_shown} END;
  IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = {table_text}::regclass AND NOT attisdropped
             AND attname = CASE marked ->> 'mode' WHEN 'swap' THEN {vector_text} ELSE {source_text} END) THEN
    RAISE EXCEPTION USING HINT = 'Rename or drop it: undoing the cutover needs that name.', MESSAGE = {has_got}
      || CASE marked ->> 'mode' WHEN 'swap' THEN {vector_shown} ELSE {source_shown} END || ' since the cutover';
  END IF;
  SELECT format_type(atttypid, NULL) AS type INTO found FROM pg_attribute
   WHERE attrelid = {table_text}::regclass AND attname = {archive_text} AND NOT attisdropped;
  IF found.type <> 'bytea' THEN
    RAISE EXCEPTION USING MESSAGE = {archive_of_type} || found.type, HINT = 'Rename or drop it.';
  END IF;
  SELECT format_type(atttypid, atttypmod) AS type INTO found FROM pg_attribute
   WHERE attrelid = {table_text}::regclass AND quote_ident_always = now AND NOT attisdropped;
  IF found.type NOT LIKE '%vector({size})' THEN
    RAISE EXCEPTION USING MESSAGE = 'column ' || now || ' is ' || found.type,
      HINT = 'Set OM_VEC_DIM to the dimensions that it has.';
  END IF;""".replace("quote_ident_always", """'"' || replace(attname, '"', '""') || '"'""")
CHECK_BACK = (
    BEGIN_BACK
    + """BEGIN
  {gate_back}
END
{tag};
"""
)
FOLLOW = (
    BEGIN_BACK
    + """BEGIN
  {all_rows}
  {gate_back}
  {find_extension}
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
      IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = {table_text}::regclass AND attname = {archive_text}
                     AND NOT attisdropped) THEN
        ALTER TABLE {table} ADD COLUMN {archive} bytea;
        EXECUTE {alter_archive} || 'SET STORAGE ' || CASE marked -> 'source' ->> 'storage'
          WHEN 'p' THEN 'PLAIN' WHEN 'e' THEN 'EXTERNAL' WHEN 'm' THEN 'MAIN' ELSE 'EXTENDED' END;
        IF marked -> 'source' ->> 'compression' <> '' THEN
          EXECUTE {alter_archive} || 'SET COMPRESSION ' || CASE marked -> 'source' ->> 'compression'
            WHEN 'l' THEN 'lz4' ELSE 'pglz' END;
        END IF;
        IF (marked -> 'source' ->> 'statistics')::integer >= 0 THEN
          EXECUTE {alter_archive} || 'SET STATISTICS ' || (marked -> 'source' ->> 'statistics');
        END IF;
      END IF;
      EXECUTE replace({create_unconvert}, {ext}, {quoted});
      IF EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {table_text}::regclass AND tgname = {back_text}) THEN
        DROP TRIGGER {back} ON {table};
      END IF;
      EXECUTE replace({create_following}, {now}, now);
      EXECUTE {revoke_back};
      EXECUTE replace({following}, {now}, now);
      EXIT;
    {again}
  END LOOP;
END
{tag};
"""
)
BATCHES_BACK = """  total bigint;
  done bigint := 0;
  moved bigint;
  page bigint;
  last_page bigint;
  pages integer := 1;
  pending bigint;
  said timestamptz := clock_timestamp();
  wait text := {wait};
"""
REBUILD = (
    BEGIN_BACK
    + BATCHES_BACK
    + """  before bigint;
  idle integer := 0;  -- passes in a row that have left as many as there were
BEGIN
  {all_rows}
  {gate_back}
  EXECUTE replace({count_pending}, {now}, now) INTO total;
  before := total;
  LOOP
    {batches}
    {all_rows}
    EXECUTE replace({count_pending}, {now}, now) INTO pending;
    idle := CASE WHEN pending < before THEN 0 ELSE idle + 1 END;
    before := pending;
    EXIT WHEN pending = 0 OR idle = {most_idle};
  END LOOP;
  IF pending > 0 THEN
    RAISE EXCEPTION USING MESSAGE = pending || {still_pending}, HINT = {past_the_trigger};
  END IF;
  RAISE NOTICE USING MESSAGE = {label} || done || ' of ' || total || ' rows';
END
{tag};
"""
)
REBUILD_BATCH = "EXECUTE replace({rebuild_pages}, {now}, now) USING {these_pages};"
REBUILD_PAGES = """
UPDATE ONLY {table} SET {archive} = {unconvert}({now})
WHERE ctid >= $1 AND ctid < $2 AND {now} IS NOT NULL AND {archive} IS NULL
"""
PUT_BACK = (
    BEGIN_BACK
    + BATCHES_BACK
    + """  pk record;
BEGIN
  {all_rows}
  {gate_back}
  IF NOT {kept_exists} THEN
    RETURN;
  END IF;
  {find_key}
  SELECT count(*) INTO total FROM {kept};
  {batches}
  RAISE NOTICE USING MESSAGE = {label} || done || ' of ' || total || ' rows';
END
{tag};
"""
)
PLAN_OF_KEPT = "PERFORM set_config('row_security', 'off', true), set_config('lock_timeout', wait, true);"
PUT_BACK_BATCH = """EXECUTE replace(replace(replace(replace({put_back}, {now}, now), '@same@', pk.same),
                                          '@page@', page::text), '@end@', (page + pages)::text);"""
# a vector that isn't there has bytes that can be none
COMPARE_BACK = """
SELECT count(*) AS rows, count(*) FILTER (WHERE openmemory_wrong) AS wrong,
       min(CASE WHEN openmemory_wrong THEN @shown@ END) AS example
FROM {table} AS t CROSS JOIN LATERAL (
  SELECT CASE WHEN t.{archive} IS NULL THEN false
              WHEN t.{now} IS NOT NULL THEN t.{archive} <> {unconvert}(t.{now})
              WHEN octet_length(t.{archive}) <> 4 * {size} THEN false
              ELSE NOT EXISTS (SELECT FROM generate_series(0, 4 * {size} - 4, 4) AS i
                               WHERE get_byte(t.{archive}, i + 3) & 127 = 127
                                 AND get_byte(t.{archive}, i + 2) & 128 = 128)
         END AS openmemory_wrong) AS s
"""
VERIFY_BACK = (
    BEGIN_BACK
    + """  pk record;
  nulls bigint;
BEGIN
  {all_rows}
  {gate_back}
  {find_key}
  FOR look IN 1..2 LOOP
    EXECUTE replace(replace({compare_back}, {now}, now), '@shown@', pk.shown) INTO found;
    EXIT WHEN found.wrong = 0;
  END LOOP;
  IF found.wrong > 0 THEN
    RAISE EXCEPTION USING MESSAGE = 'in ' || found.wrong || {wrong_back} || now || ' says',
      DETAIL = 'Such as (' || found.example || '). They were written past the trigger.', HINT = {mend_back};
  END IF;
  RAISE NOTICE USING MESSAGE = {verified} || found.rows || ' rows';
  SELECT marked -> 'source' ->> 'not_null' = 'true' AS not_null INTO found;
  {require_values}
END
{tag};
"""
)
IS_OURS = """FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_am am ON am.oid = relam
 WHERE indrelid = to_regclass({table_text}) AND amname IN ('ivfflat', 'hnsw') AND indexrelid"""
# newer OpenMemory's index, which wasn't there before the cutover, is dropped when there is time: after the switch
DROP_NAMED = "SELECT 'DROP INDEX {concurrently}' || indexrelid::regclass {is_ours} IN ({named}) AND {when}"
SWITCH_BACK = (
    BEGIN_BACK
    + """  lines text[];
  line text;
BEGIN
  {all_rows}
  {gate_back}
  {find_extension}
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
      LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;
      {gate_back}
      IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {table_text}::regclass AND tgname = {back_text}
                     AND NOT tgisinternal AND tgenabled IN ('O', 'A')) THEN
        RAISE EXCEPTION USING MESSAGE = {no_back_trigger}, HINT = 'Run the same script again.';
      END IF;
      DROP TRIGGER {back} ON {table};
      DROP FUNCTION {back_function}();
      {drop_unconvert}
      IF marked ->> 'mode' = 'swap' THEN
        lines := ({grants_to_vector}) || ({grants_back});
        IF (SELECT attnotnull FROM pg_attribute WHERE attrelid = {table_text}::regclass AND attname = {source_text})
           AND marked -> 'vector' ->> 'not_null' = 'false' THEN
          ALTER TABLE {table} ALTER COLUMN {source} DROP NOT NULL;
        END IF;
        ALTER TABLE {table} RENAME COLUMN {source} TO {vector};
      ELSE
        lines := ({grants_of_mark});
        FOR line IN SELECT DISTINCT one ->> 0 FROM json_array_elements(marked -> 'source' -> 'grants') AS one
                    WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = one ->> 0) AND one ->> 0 IS NOT NULL LOOP
          RAISE WARNING USING MESSAGE = 'there is no role "' || line || '"' || {had_privileges};
        END LOOP;
      END IF;
      ALTER TABLE {table} RENAME COLUMN {archive} TO {source};
      FOREACH line IN ARRAY lines LOOP
        EXECUTE line;
      END LOOP;
      IF marked -> 'source' ->> 'not_null' = 'true' THEN
        ALTER TABLE {table} ALTER COLUMN {source} SET NOT NULL;
      END IF;
      {unprove}
      EXECUTE {alter_source} || coalesce('SET DEFAULT ' || (marked -> 'source' ->> 'default'), 'DROP DEFAULT');
      EXECUTE {comment_source} || coalesce(quote_literal(nullif(marked -> 'source' ->> 'comment', '')), 'NULL');
      EXECUTE {remark};
      {create_trigger}
      IF {may_be_newer} AND marked ->> 'mode' = 'swap'
         AND EXISTS (SELECT {is_ours} = to_regclass({newer_text})) THEN
        EXECUTE {rename_newer} || quote_ident(coalesce(marked ->> 'renamed', {old_name}));
      END IF;
      IF {kept_exists} THEN
        DROP TABLE {kept};
      END IF;
      EXIT;
    {again}
  END LOOP;
  RAISE NOTICE USING MESSAGE = {is_undone}, DETAIL = CASE marked ->> 'mode' WHEN 'swap' THEN {no_more_vectors}
    ELSE {vectors_alone} END;
END
{tag};
"""
)
