-- the steps as DO blocks, which find out, when they run, what the online steps ask the catalogs

-- quoted --
-- a host's column may have the name of a variable: that is why every DO block has #variable_conflict
-- always quoted, as the online steps write it: the text of a function is to be the same
'"' || pg_catalog.replace(extension, '"', '""') || '"'

-- tid --
pg_catalog.format('(%s,%s)', {place} / {places}, {place} % {places})::tid

-- lock_failed --
lock_not_available OR deadlock_detected

-- psql --
-- psql goes on after an error, to the stamp, unless it is told otherwise; and these may be set for whoever runs it
\set ON_ERROR_STOP on
\set ON_ERROR_ROLLBACK off
\set AUTOCOMMIT on
\encoding UTF8

-- untimed --
-- before a DO block, since none can put off the statement_timeout that it has begun under. CONCURRENTLY waits for
-- others, and what has to be quick sets a lock_timeout of its own; types and names are compared as the catalogs show
-- them unquoted
SET default_transaction_isolation = 'read committed'; SET lock_timeout = '1h'; SET statement_timeout = 0;
SET quote_all_identifiers = off;

-- timed --
RESET default_transaction_isolation; RESET lock_timeout; RESET statement_timeout; RESET quote_all_identifiers;

-- read_committed --
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;

-- untimed_here --
SET LOCAL statement_timeout = 0; SET LOCAL quote_all_identifiers = off;

-- together --
-- fails outside a transaction. A runner that goes on has the blocks fail, and with them the stamp
LOCK TABLE pg_catalog.pg_extension IN ACCESS SHARE MODE; SET LOCAL client_encoding = 'UTF8';

-- begun --
-- each block and each stamp is done only where all before it have been: a runner may go on after an error, or connect
-- anew. What one has set is gone with its session, and with its transaction where it has failed
SET {scope} openmemory.step = 'begun';

-- host_path --
-- of whoever runs the script: what changes rows has it, as their triggers and defaults may need it; all else has ours
host_path CONSTANT text := CASE WHEN pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.~*) '(^|,)[[:space:]]*"?pg_catalog"?[[:space:]]*(,|$)' THEN 'pg_catalog, ' ELSE '' END
                             OPERATOR(pg_catalog.||) pg_catalog.current_setting('search_path');

-- ours --
PERFORM pg_catalog.set_config('search_path', {path|literal}, true);

-- hosts --
PERFORM pg_catalog.set_config('search_path', host_path, true);

-- commit --
-- with which ends what was set
COMMIT;
      {>ours}

-- next --
{>ours}
  IF pg_catalog.current_setting('openmemory.step', true) IS DISTINCT FROM {before|literal} THEN
    RAISE EXCEPTION USING MESSAGE = {not_next|literal}, HINT = {not_next_hint|literal};
  END IF;
  PERFORM pg_catalog.set_config('lock_timeout', '{lock_timeout}ms', true);

-- done --
{>hosts}
  PERFORM pg_catalog.set_config('openmemory.step', {after|literal}, {local});

-- begin --
-- the first statements of every block. Whoever has waited for a lock has to see what its holder has committed
{>next}
  IF pg_catalog.current_setting('transaction_isolation') NOT LIKE 'read %' THEN
    RAISE EXCEPTION USING MESSAGE = 'the transaction is not READ COMMITTED, but '
        || pg_catalog.upper(pg_catalog.current_setting('transaction_isolation')),
      DETAIL = 'Rows that others commit while a statement waits for a lock would be missed.',
      HINT = 'Begin it with BEGIN ISOLATION LEVEL READ COMMITTED, or set default_transaction_isolation before.';
  END IF;
  PERFORM pg_catalog.set_config('row_security', 'off', true), pg_catalog.set_config('statement_timeout', '0', true);
  PERFORM pg_catalog.set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout';

-- stamp --
DO {tag}
#variable_conflict use_column
DECLARE
  {>host_path}
  rows bigint;
  statement text;
BEGIN
  {>next}
  EXECUTE {stamp|literal};
  GET DIAGNOSTICS rows = ROW_COUNT;
  FOREACH statement IN ARRAY ARRAY(SELECT statement FROM ({>questions.own_versions}) AS wanted) LOOP
    EXECUTE statement;
  END LOOP;
  IF rows <> 1 OR (SELECT pg_catalog.count(*) > 1 FROM {versions}) THEN
    RAISE EXCEPTION 'not stamped: the version table is not as this script has to find it'
      USING HINT = 'Print the script anew, from the revision that is stamped.';
  END IF;
  {>done}
END
{tag};

-- expand --
DO {tag}
#variable_conflict use_column
DECLARE
  {>host_path}
  extension text;
  found record;
  lost bigint;
  writes boolean;
  statement text;
BEGIN
  {>begin}
  {>require_ordinary}
  SELECT * INTO found FROM ({expand_requirements}) AS unmet WHERE severity = 'error' LIMIT 1;
  {>raise_found}
  {>require_no_rule}
  IF EXISTS (SELECT FROM {table} WHERE {source} IS NOT NULL)
     AND NOT EXISTS (SELECT FROM {table} WHERE {of_length}) THEN
    RAISE EXCEPTION USING MESSAGE = 'no row of ' || {itself} || ' holds a vector of {size} dimensions',
      DETAIL = (SELECT pg_catalog.string_agg(octets || ' bytes: ' || rows || ' rows', '; ' ORDER BY octets)
                FROM (SELECT {length} AS octets, pg_catalog.count(*) AS rows FROM {table} GROUP BY 1) AS lengths);
  END IF;
  {>find_extension}
  IF extension IS NULL THEN
    extension := {>questions.home};
    EXECUTE 'CREATE EXTENSION vector SCHEMA ' || {>quoted};
  END IF;
  {>find_column}
  IF found.type IS NOT NULL AND NOT found.ours THEN
    EXECUTE pg_catalog.format({count_lost}, {>quoted}) INTO lost;
    IF lost > 0 THEN
      RAISE EXCEPTION USING MESSAGE = lost || ' vectors of other than {size} dimensions have no source beside them';
    END IF;
  END IF;
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      writes := EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {table_text|literal}::regclass AND NOT tgisinternal
                        AND tgenabled <> 'D' AND tgname <> {sync_text|literal});
      IF writes THEN
        {>try_write}
        WHEN {>lock_failed} THEN
          RAISE;  -- another try may find it free
        WHEN OTHERS THEN
          writes := false;
        END;
      END IF;
      FOREACH statement IN ARRAY ARRAY(SELECT statement FROM ({>questions.add_column}) AS wanted)
                          || ARRAY(SELECT statement FROM ({>questions.add_trigger}) AS wanted WHERE {sync_trigger}) LOOP
        EXECUTE statement;
      END LOOP;
      IF writes THEN
        {>try_write}
        WHEN {>lock_failed} THEN
          RAISE;
        WHEN OTHERS THEN
          RAISE EXCEPTION USING MESSAGE = 'UPDATE of ' || {itself} || ' would fail from now on: in a trigger, SQLSTATE ' || SQLSTATE, HINT = {name_columns|literal};
        END;
      END IF;
      EXIT;
    {>again}
  END LOOP;
  {>find_column}
  {>require_size}
  {>done}
END
{tag};

-- backfill --
-- In a pass each batch is tried by itself: one that fails is halved down to the row that can't be updated, which is
-- passed over, as is one whose UPDATE had no effect. Rows that somebody has locked are left to the next pass. The passes
-- end when nothing else is left to convert; without the trigger, when nothing is left that was locked all the time, as
-- the rest was written since; and after so many in a row that leave no fewer rows.
DO {tag}
#variable_conflict use_column
<<om>>
DECLARE
  {>host_path}
  extension text;
  found record;
  adopted boolean;
  total bigint;
  done bigint := 0;
  passes integer := 0;
  changed bigint;
  moved bigint;
  place bigint;
  first_tid tid;
  end_tid tid;
  last_place bigint;
  places bigint := {places};
  attempt integer := 0;
  refused tid[];
  reasons text[];
  same tid[];
  more bigint;
  unchanged tid[];
  is_right boolean;
  remaining text;
  conversion text;
  same_bytes text := 'true';
  among_triggers boolean;
  is_free boolean;
  filled tid[];
  sums bytea[];
  is_native boolean := false;
  convertible bigint;
  before bigint;
  free tid[];
  locked tid[];
  were_locked tid[];
  statement text;
  waits integer := 0;
  said timestamptz := pg_catalog.clock_timestamp();
  skipped text[];
  line text;
  wait text;
BEGIN
  {>begin}
  wait := ({>db.batch_timeout});
  {>require_table}
  {>find_extension}
  {>require_column}
  {>require_size}
  {>require_no_rule}
  {>find_aside}
  adopted := found.set_aside IS TRUE;
  EXECUTE pg_catalog.format({create_convert}, {>quoted});
  conversion := {portable};
  IF {may_be_native} AND pg_catalog.current_setting('is_superuser')::boolean AND EXISTS (
       SELECT FROM pg_extension WHERE extname = 'vector'
       AND pg_catalog.string_to_array(pg_catalog.regexp_replace(extversion, '[^0-9.]', '', 'g'), '.')::integer[] >= {native_version}) THEN
    BEGIN
      EXECUTE pg_catalog.format({create_native}, {>quoted});
      EXECUTE pg_catalog.format({try_native|literal}, {>quoted}) INTO is_native;
      IF is_native THEN
        conversion := pg_catalog.format({native}, {>quoted});
      END IF;
    EXCEPTION WHEN OTHERS THEN
      RAISE NOTICE 'the server refuses its function for native conversion (SQLSTATE %)', SQLSTATE;
    END;
  END IF;
  IF {has_to_be_native} AND NOT is_native THEN
    RAISE EXCEPTION 'OM_BACKFILL_ENGINE=native can''t be had: it takes a superuser and pgvector 0.5 or newer'
      USING HINT = 'Leave OM_BACKFILL_ENGINE unset, which takes a function in the server.';
  END IF;
  RAISE NOTICE USING MESSAGE = {label|literal}
    || CASE WHEN is_native THEN 'the server''s own code converts' ELSE 'a function in the server converts' END;
  among_triggers := EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {table_text|literal}::regclass AND tgtype & 16 <> 0
                    AND NOT tgisinternal AND tgenabled <> 'D' AND tgname <> {sync_text|literal});
  IF among_triggers THEN
    same_bytes := {same_bytes};  -- or there is nobody who could change them
  END IF;
  EXECUTE CASE WHEN adopted THEN {count_adopted} ELSE {count} END INTO total;
  before := total;
  LOOP
    passes := passes + 1;
    changed := 0;
    refused := '{}';
    reasons := '{}';
    unchanged := '{}';
    place := 0;
    {>share}
    last_place := pg_catalog.pg_relation_size({table_text|literal}::regclass) / pg_catalog.current_setting('block_size')::integer * {places};
    WHILE place < last_place LOOP
      PERFORM pg_catalog.set_config('row_security', 'off', true), pg_catalog.set_config('lock_timeout', wait, true),
              pg_catalog.set_config('enable_seqscan', 'off', true), pg_catalog.set_config('enable_hashjoin', 'off', true),
              pg_catalog.set_config('enable_mergejoin', 'off', true), pg_catalog.set_config('enable_indexscan', 'off', true),
              pg_catalog.set_config('enable_indexonlyscan', 'off', true), pg_catalog.set_config('enable_bitmapscan', 'off', true),
              pg_catalog.set_config('max_parallel_workers_per_gather', '0', true);
      is_free := false;
      BEGIN
        LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE;
        is_free := true;
        moved := 0;
        -- a row that others have changed before it was locked is missed by that UPDATE, and found by the next
        FOR look IN 1..3 LOOP
          first_tid := {tid_of_place};
          end_tid := {tid_of_end};
          {>hosts}
          EXECUTE pg_catalog.format(CASE WHEN adopted THEN {convert_pages_adopted} ELSE {convert_pages} END, conversion, same_bytes)
            INTO more, filled, sums, same, is_right USING first_tid, end_tid, among_triggers;{immediate}
          {>ours}
          moved := moved + more;
          -- nobody else can have moved what is locked
          IF (SELECT pg_catalog.count(*) FROM ONLY {table} WHERE ctid = ANY (om.same)) < pg_catalog.cardinality(same) THEN
            is_right := false;
          END IF;
          IF among_triggers AND (SELECT pg_catalog.count(*) FROM ONLY {table} WHERE ctid = ANY (om.filled)) < pg_catalog.cardinality(filled) THEN
            -- written once more, by a trigger AFTER it: each has to have its value, and its bytes, all the same
            EXECUTE pg_catalog.format(CASE WHEN adopted THEN {count_right_adopted} ELSE {count_right} END, conversion)
              INTO more USING filled, sums;
            is_right := is_right AND more = pg_catalog.cardinality(filled);
          END IF;
          IF NOT is_right THEN
            -- a trigger sets another vector, or changes the row, whatever is written
            RAISE EXCEPTION USING ERRCODE = 'OM001';
          END IF;
          EXIT WHEN same IS NULL;
        END LOOP;
        changed := changed + moved;
        unchanged := unchanged || same;
        attempt := CASE WHEN moved > 0 THEN 0 ELSE attempt END;
        place := place + places;
        places := CASE WHEN moved > {batch} THEN greatest(least(places, {places}), places / 2)
                       ELSE least(places * 2, {pages} * {places}) END;
      EXCEPTION
        WHEN {>lock_failed} THEN
          IF NOT is_free AND attempt >= {tries} - 1 THEN
            RAISE;
          ELSIF is_free AND places > 1 THEN
            places := places / 2;  -- of what a trigger wants for one of the rows
          ELSIF is_free AND attempt >= 3 THEN
            place := place + 1;  -- it is found again when all others are done
            attempt := 0;
          ELSE
            attempt := attempt + 1;
            {>rest}
          END IF;
        WHEN OTHERS THEN
          GET STACKED DIAGNOSTICS line = PG_EXCEPTION_CONTEXT;
          IF SQLSTATE ~ {not_a_rows|literal}
             -- what a function of others' raises, or comes upon, is about a row
             AND NOT (SQLSTATE ~ {unless_of_a_function|literal}
                      AND line ~ 'PL/[A-Za-z0-9]+ function (?!inline_code_block)')
             AND line !~ ('^PL/[A-Za-z0-9]+ function (?!inline_code_block)[^' || pg_catalog.chr(10) || ']* at RAISE') THEN
            RAISE;  -- of the statement, the transaction or the server, not of a row
          ELSIF places > 1 THEN
            places := places / 2;
          ELSIF NOT EXISTS (SELECT FROM ONLY {table} WHERE ctid = {tid_of_om_place}) THEN
            RAISE;  -- of no row: by a trigger FOR EACH STATEMENT
          ELSE
            IF SQLSTATE = 'OM001' THEN
              unchanged := unchanged || {tid_of_place};
            ELSE
              -- not its message, which may show what is in the row
              GET STACKED DIAGNOSTICS line = CONSTRAINT_NAME;
              refused := refused || {tid_of_place};
              reasons := reasons || pg_catalog.concat('ctid=', {tid_of_place}, ': SQLSTATE ', SQLSTATE, ' ' || nullif(line, ''));
              reasons := reasons[1:5];
            END IF;
            place := place + 1;
          END IF;
      END;
      {commit}
      IF pg_catalog.clock_timestamp() - said > interval '5 seconds' THEN
        said := pg_catalog.clock_timestamp();
        RAISE NOTICE USING MESSAGE = {label|literal} || done + changed || ' of ' || total || ' rows';
      END IF;
    END LOOP;
    done := done + changed;
    {>share}
    -- a row may have been moved by each of several batches
    unchanged := ARRAY(SELECT ctid FROM {table} WHERE ctid = ANY (om.unchanged));
    refused := refused || unchanged;
    remaining := pg_catalog.format(CASE WHEN adopted THEN {remaining_adopted} ELSE {remaining} END, conversion);
    EXECUTE 'SELECT pg_catalog.array_agg(tid) FROM (' || remaining || ') AS rows' INTO locked USING refused;
    convertible := coalesce(pg_catalog.cardinality(locked), 0);
    EXIT WHEN convertible = 0;
    EXECUTE 'SELECT pg_catalog.array_agg(tid) FROM (' || remaining || ' FOR NO KEY UPDATE SKIP LOCKED) AS rows'
      INTO free USING refused;
    {commit}
    locked := ARRAY(SELECT pg_catalog.unnest(locked) EXCEPT SELECT pg_catalog.unnest(free));
    EXIT WHEN NOT {sync_trigger} AND passes > 1 AND NOT locked && were_locked;
    waits := CASE WHEN changed > 0 AND convertible < before THEN 0 ELSE waits + 1 END;
    EXIT WHEN waits > {tries};
    before := convertible;
    were_locked := locked;
    IF waits > 0 THEN
      attempt := waits;
      {>rest}
      attempt := 0;
    END IF;
  END LOOP;
  RAISE NOTICE USING MESSAGE = {label|literal} || done || ' of ' || total || ' rows';
  IF waits > {tries} THEN
    locked := CASE WHEN locked = '{}' THEN free ELSE locked END;
    refused := refused || locked;
    reasons := reasons || ((SELECT pg_catalog.string_agg('ctid=' || tid, ', ') FROM pg_catalog.unnest(locked[1:5]) AS tid)
                           || ': locked by others, or written all the time');
  END IF;
  IF unchanged <> '{}' THEN
    reasons := reasons || ((SELECT pg_catalog.string_agg('ctid=' || tid, ', ') FROM pg_catalog.unnest(unchanged[1:5]) AS tid)
      || ': not changed by an UPDATE' || coalesce((
        SELECT ', perhaps because of ' || pg_catalog.string_agg('trigger ' || pg_catalog.quote_ident(tgname), ', ') FROM pg_trigger
         WHERE tgrelid = {table_text|literal}::regclass AND tgtype & 16 <> 0 AND NOT tgisinternal AND tgname <> {sync_text|literal}),
      ''));
  END IF;
  IF reasons <> '{}' THEN
    {commit}
    RAISE EXCEPTION USING
      MESSAGE = {label|literal} || pg_catalog.cardinality(refused) || ' rows can''t be updated or read',
      DETAIL = pg_catalog.array_to_string(reasons, '; ') || '.' || {others_kept|literal},
      HINT = 'Mend these rows or what keeps them, then run this step again.';
  END IF;
  FOR attempt IN 1..{tries} LOOP
    EXIT WHEN NOT adopted;
    BEGIN
      PERFORM pg_catalog.set_config('lock_timeout', wait, true);
      -- whoever writes waits while it is seen that nothing goes with the column that has not been carried over
      LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE;
      EXECUTE {not_carried} INTO moved;
      IF moved > {accept_loss} THEN
        RAISE EXCEPTION USING MESSAGE = moved || ' values of ' || {adopted_shown} || ' would be lost, so it stays',
          DETAIL = 'Their rows hold bytes that no vector can hold, or a trigger changes them on their way.',
          HINT = 'Mend that and run this step again, or accept the loss with OM_ACCEPT_LOSS=' || moved;
      END IF;
      FOREACH statement IN ARRAY ARRAY(SELECT statement FROM ({>questions.remove_adopted}) AS wanted) LOOP
        EXECUTE statement;
      END LOOP;
      EXIT;
    {>again}
  END LOOP;
  {drop_native}
  SELECT pg_catalog.array_agg(rows || ' rows can''t be converted and were skipped: ' || reason ORDER BY rows DESC)
         FILTER (WHERE reason <> 'written meanwhile'),
         pg_catalog.sum(rows) FILTER (WHERE reason = 'written meanwhile')
    INTO skipped, convertible FROM (
      SELECT {>reason} AS reason, pg_catalog.count(*) AS rows
      FROM {table} WHERE {vector} IS NULL AND {source} IS NOT NULL GROUP BY 1) AS left_over;
  {convert_no_more}
  {commit}
  IF convertible > 0 THEN
    RAISE WARNING USING MESSAGE = convertible || ' rows were written during the backfill and have no vector',
      DETAIL = 'OM_SYNC_TRIGGER is off, so nothing converts what the application writes.';
  END IF;
  IF {fail} AND skipped IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = pg_catalog.array_to_string(skipped, '; '),
      DETAIL = 'All others are converted. OM_ON_BAD_ROWS is fail.';
  END IF;
  FOREACH line IN ARRAY coalesce(skipped, '{}') LOOP
    RAISE WARNING USING MESSAGE = line;
  END LOOP;
  {>done}
END
{tag};

-- reason --
coalesce({problem},
             CASE WHEN {holds_no_number} THEN {not_finite|literal} ELSE 'written meanwhile' END)

-- rest --
-- the end of a try, in the loop over `attempt`
PERFORM pg_catalog.pg_sleep({rest_before});

-- again --
EXCEPTION WHEN {>lock_failed} THEN
      IF attempt = {tries} THEN
        RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = 'no lock on table ' || {itself} || ' in {tries} tries of {lock_timeout} ms',
          DETAIL = coalesce('Locks on the table are held by ' || ({holders}) || '.', 'No lock on the table is held now.'),
          HINT = 'Run this step again when that transaction is over.';
      END IF;
      RAISE NOTICE USING MESSAGE = 'no lock on the table, try ' || attempt || ' of {tries}';
      -- the server ends an autovacuum for whoever waits longer than deadlock_timeout
      PERFORM CASE WHEN pg_catalog.current_setting('is_superuser')::boolean THEN pg_catalog.set_config('deadlock_timeout', '100ms', true)
                   WHEN attempt = 1 AND setting::integer + {longer} <= {most_for_autovacuum}
                     THEN pg_catalog.set_config('lock_timeout', setting::integer + {longer} || 'ms', true) END,
              CASE WHEN attempt > 1 THEN pg_catalog.set_config('lock_timeout', ({>db.batch_timeout}), true) END
         FROM pg_settings
        WHERE name = 'deadlock_timeout' AND EXISTS (
          SELECT FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid AND a.usesysid IS NULL
          WHERE granted AND mode = 'ShareUpdateExclusiveLock' AND relation = pg_catalog.to_regclass({table_text|literal}));
      {>rest}
    END;

-- share --
-- of a pass: before what reads the table, or locks rows, as a COMMIT has taken lock and settings
PERFORM pg_catalog.set_config('row_security', 'off', true), pg_catalog.set_config('statement_timeout', '0', true),
            pg_catalog.set_config('lock_timeout', '{lock_timeout}ms', true);
    FOR attempt IN 1..{tries} LOOP
    BEGIN
      LOCK TABLE {table} IN ROW SHARE MODE;
      EXIT;
    {>again}
    END LOOP;

-- holders --
SELECT pg_catalog.string_agg(holder, '; ') FROM ({>db.holders}) AS held

-- pending_adopted --
-- a row without a vector, which is to get it from its bytes, or from the column that was set aside if it has none
{vector} IS NULL
  AND CASE WHEN {source} IS NULL THEN {adopted} IS NOT NULL ELSE {of_length} END

-- count_right --
-- by the newest versions of rows that this transaction has written
WITH om_written AS (
  SELECT * FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS given (om_tid, om_sum))
SELECT pg_catalog.count(*) FROM {>db.newest}
WHERE pg_catalog.record_image_eq(ROW({vector}), ROW({value})) AND pg_catalog.sha256({source}) IS NOT DISTINCT FROM w.om_sum

-- count_pending --
SELECT pg_catalog.count(*) FROM ONLY {table} WHERE {pending}

-- value_adopted --
CASE WHEN {source} IS NULL THEN {adopted} ELSE {value} END

-- convert_pages --
-- locked, a row doesn't change between its conversion and its update; xmin: nor before the lock. Of those
-- that were taken, how many were updated and where they are, those that a trigger has kept as they were, and whether
-- the others have their value and their bytes
WITH batch AS MATERIALIZED (
  SELECT ctid AS tid, xmin AS version, {value} AS vector, {source} AS source FROM ONLY {table}
  WHERE ctid >= $1 AND ctid < $2 AND {pending} FOR NO KEY UPDATE SKIP LOCKED),
done AS (
  UPDATE ONLY {table} AS t SET {vector} = batch.vector FROM batch
  WHERE t.ctid = batch.tid AND t.xmin = batch.version AND batch.vector IS NOT NULL
  RETURNING batch.tid, t.ctid AS place,
            pg_catalog.record_image_eq(ROW(t.{vector}), ROW(batch.vector)) AND {same_bytes} AS ok,
            CASE WHEN $3 THEN pg_catalog.sha256(t.{source}) END AS sum)
SELECT pg_catalog.count(place), pg_catalog.array_agg(place) FILTER (WHERE place IS NOT NULL),
       pg_catalog.array_agg(sum) FILTER (WHERE place IS NOT NULL), pg_catalog.array_agg(tid) FILTER (WHERE place IS NULL), pg_catalog.bool_and(ok)
FROM batch LEFT JOIN done USING (tid) WHERE batch.vector IS NOT NULL

-- remaining --
-- without those that the server has refused: $1
SELECT ctid AS tid FROM ONLY {table}
WHERE {pending} AND CASE WHEN ctid = ANY ($1) THEN false ELSE {value} IS NOT NULL END

-- drop_expand --
DO {tag}
#variable_conflict use_column
DECLARE
  {>host_path}
  found record;
  aside record;
  statement text;
  lost bigint;
  not_finite bigint;
  newly bigint;
  counted xid;
BEGIN
  {>begin}
  IF pg_catalog.to_regclass({table_text|literal}) IS NULL THEN
    RAISE WARNING USING MESSAGE = 'table ' || {itself} || ' does not exist';
    {>done}
    RETURN;
  END IF;
  {>require_ordinary}
  SELECT * INTO found FROM ({>questions.own_function}) AS unmet LIMIT 1;
  {>raise_found}
  PERFORM pg_catalog.set_config('lock_timeout', ({>db.batch_timeout}), true);
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      {>find_aside}
      aside := found;
      {>find_column}
      IF found.ours AND not_finite IS NULL THEN
        -- once, and without keeping anybody waiting, as it reads all bytes; those of newer versions under the lock
        counted := CAST(pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot()) AS xid);
        EXECUTE pg_catalog.format({count_not_finite}, '<=') || CASE WHEN aside.set_aside THEN {not_kept} ELSE '' END
          INTO not_finite USING counted;
      END IF;
      -- whoever writes waits while it is counted what would be lost, readers don't. In each try anew, as others can
      -- write between two of them
      LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE;
      {>find_aside}
      aside := found;
      {>find_column}
      IF found.ours THEN
        EXECUTE {count_sourceless} || CASE WHEN aside.set_aside THEN {not_kept} ELSE '' END INTO lost;
        EXECUTE pg_catalog.format({count_not_finite}, '>') || CASE WHEN aside.set_aside THEN {not_kept} ELSE '' END
          INTO newly USING counted;
        lost := lost + coalesce(not_finite, 0) + newly;
        IF lost > {accept_loss} THEN
          RAISE EXCEPTION USING MESSAGE = lost || ' values have no source and would be lost',
            HINT = 'Copy them elsewhere first, or accept the loss with OM_ACCEPT_LOSS=' || lost;
        END IF;
      END IF;
      FOREACH statement IN ARRAY ARRAY(SELECT statement FROM ({>questions.remove_trigger}) AS wanted)
                          || ARRAY(SELECT statement FROM ({>questions.remove_column}) AS wanted) LOOP
        EXECUTE statement;
      END LOOP;
      -- of a cutover that was interrupted and never resumed; its other preparations go along
      IF {>kept_exists} THEN
        LOCK TABLE {kept} IN ACCESS EXCLUSIVE MODE;
        IF EXISTS (SELECT FROM {kept}) THEN
          RAISE EXCEPTION USING MESSAGE = 'rows of ' || {itself} || ' are in table ' || {kept_shown} || ', where a cutover has left them', HINT = {kept_hint|literal};
        END IF;
        DROP TABLE {kept};
      END IF;
      EXIT;
    {>again}
  END LOOP;
  {>done}
END
{tag};

-- try_write --
-- a function's statement has the columns of a row that there were when this session ran it first
EXECUTE 'DISCARD PLANS';
        BEGIN
          -- less than deadlock_timeout: or who has a row that a trigger wants would have to give way
          PERFORM pg_catalog.set_config('lock_timeout', {trial_timeout|literal}, true);
          {>hosts}
          EXECUTE {write};
          SET CONSTRAINTS ALL IMMEDIATE;
          RAISE EXCEPTION USING ERRCODE = 'OM000';
        EXCEPTION WHEN SQLSTATE 'OM000' THEN
          NULL;

-- kept_exists --
coalesce(pg_catalog.starts_with(pg_catalog.obj_description(pg_catalog.to_regclass({kept_text|literal}), 'pg_class'), {kept_comment|literal}), false)

-- require_ordinary --
-- what scripts don't do, in either direction: the first block of each step has it, before any change, as nobody has
-- looked at the table when a script is printed; locked, so that it stays as it is seen until the block ends. There is
-- nothing to refuse where there is no table
FOR attempt IN 1..{tries} LOOP
    BEGIN
      IF EXISTS (SELECT FROM pg_class WHERE oid = pg_catalog.to_regclass({table_text|literal}) AND relkind IN ('r', 'p')) THEN
        LOCK TABLE {table} IN ACCESS SHARE MODE;
      END IF;
      EXIT;
    {>again}
  END LOOP;
  SELECT CASE attname WHEN {source_text|literal} THEN {was_swapped|literal} ELSE {was_dropped|literal} END AS what
    INTO found FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
   WHERE attrelid = pg_catalog.to_regclass({table_text|literal}) AND attname IN ({source_text|literal}, {vector_text|literal}) AND NOT attisdropped
     AND typname = 'vector' AND pg_catalog.starts_with(pg_catalog.col_description(attrelid, attnum), {cut_over_mark});
  IF found.what IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = found.what, HINT = {cut_over_hint|literal};
  END IF;
  SELECT CASE WHEN relkind = 'p' THEN {itself} || ' is a partitioned table'
              WHEN relispartition THEN {itself} || ' is a partition'
              WHEN EXISTS (SELECT FROM pg_inherits WHERE inhrelid = c.oid) THEN {itself} || ' inherits from another table'
              WHEN EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) THEN {itself} || ' is a table that others inherit from'
              WHEN relkind <> 'r' THEN {itself} || ' is not an ordinary table'
              WHEN EXISTS (SELECT FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
                           WHERE attrelid = c.oid AND attname = {source_text|literal} AND NOT attisdropped
                             AND typname = 'vector') THEN 'column ' || {source_shown} || ' of ' || {itself} || ' is of type vector already'
         END AS what INTO found FROM pg_class c WHERE c.oid = pg_catalog.to_regclass({table_text|literal});
  IF pg_catalog.to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN
    IF EXISTS (SELECT FROM pg_catalog.pg_dist_partition WHERE logicalrelid = pg_catalog.to_regclass({table_text|literal})) THEN
      SELECT {itself} || ' is distributed by Citus' AS what INTO found;
    END IF;
  END IF;
  IF found.what IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = found.what, HINT = {online_hint|literal};
  END IF;

-- require_table --
{>require_ordinary}
  SELECT * INTO found FROM ({>questions.table}) AS unmet LIMIT 1;
  {>raise_found}

-- require_no_rule --
-- where there are rows that it would keep from their vectors
SELECT * INTO found FROM ({>questions.rules}) AS unmet WHERE EXISTS (SELECT FROM {table}) LIMIT 1;
  {>raise_found}

-- raise_found --
-- what does not hold; RAISE takes no NULL
IF found.detail IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = found.message, DETAIL = found.detail, HINT = found.hint;
  ELSIF found.message IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = found.message, HINT = found.hint;
  END IF;

-- require_column --
{>find_column}
  IF found.type IS NULL OR NOT found.ours THEN
    RAISE EXCEPTION USING MESSAGE = {itself} || ' has no column ' || {vector_shown} || ' of this package';
  END IF;

-- require_size --
IF found.atttypmod <> {size} THEN
    RAISE EXCEPTION USING MESSAGE = 'column ' || {vector_shown} || ' is ' || found.type
        || CASE WHEN found.atttypmod > 0 THEN '(' || found.atttypmod || ')' ELSE '' END || ' already',
      HINT = 'Set OM_VEC_DIM to the dimensions that it has.';
  END IF;

-- find_extension --
SELECT nspname INTO extension FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace
   WHERE extname = 'vector';

-- columns --
WITH it AS ({>questions.it}), columns AS ({>questions.columns})

-- find_column --
{>columns} SELECT * INTO found FROM columns WHERE attname = {vector_name};

-- find_aside --
{>columns} SELECT * INTO found FROM columns WHERE attname = {adopted_name};

-- block --
DO {tag}
#variable_conflict use_column
DECLARE
  {>host_path}
  found record;
  statement text;
BEGIN
  {>begin}
  {body}
  {>done}
END
{tag};

-- require --
{>require_table}
  {>require_column}

-- no_index --
RAISE {level} USING MESSAGE = {no_index|literal}, HINT = {no_index_hint|literal};

-- count --
{>require_table}
  {>require_column}
  PERFORM pg_catalog.set_config('openmemory.rows', (SELECT pg_catalog.count(*) FROM {table} WHERE {vector} IS NOT NULL)::text, {local});

-- report_index --
SELECT * INTO found FROM ({>index.name_taken}) AS unmet;
  IF found.message IS NOT NULL THEN
    RAISE WARNING USING MESSAGE = found.message, HINT = found.hint;
  ELSIF pg_catalog.to_regclass({index_text|literal}) IS NOT NULL THEN
    IF pg_catalog.obj_description(pg_catalog.to_regclass({index_text|literal}), 'pg_class') IS NULL THEN
      EXECUTE 'COMMENT ON INDEX ' || {index_text|literal} || ' IS ' || pg_catalog.quote_literal({index_comment|literal});
    END IF;
    RAISE NOTICE USING MESSAGE = pg_catalog.pg_get_indexdef(pg_catalog.to_regclass({index_text|literal}));
  ELSE
    RAISE NOTICE 'no index: too few rows for ivfflat, a pgvector that is too old for this one, or too little memory';
  END IF;

-- sizes --
-- what the index is built with, by the rows that are there when the script runs; without `needed` ivfflat refuses
-- or of as many lists as `most` kB of memory are enough for, none where they aren't even for one
(SELECT CASE WHEN {lists_unused} THEN 1 ELSE coalesce(pg_catalog.max(lists) FILTER (WHERE needed <= most), 0) END AS lists,
          pg_catalog.max(lists) AS wanted, pg_catalog.max(needed) AS needed, pg_catalog.min(needed) AS least,
          CASE WHEN {lists_unused} THEN pg_catalog.max({hnsw_kb})
               ELSE coalesce(pg_catalog.max(needed) FILTER (WHERE needed <= most), 0) END AS memory
   FROM (SELECT *, {ivfflat_kb} AS needed
         FROM (SELECT pg_catalog.current_setting('openmemory.rows')::bigint AS rows, {most_memory} AS most) AS c,
              LATERAL pg_catalog.generate_series(1, {lists}) AS lists)
   AS n)

-- memory_given --
PERFORM pg_catalog.set_config('maintenance_work_mem', '{given}kB', {local});

-- memory --
PERFORM pg_catalog.set_config('maintenance_work_mem',
      greatest(pg_catalog.pg_size_bytes(pg_catalog.current_setting('maintenance_work_mem')) / 1024, least(memory, {most_memory})) || 'kB',
      {local})
     FROM {>sizes} AS sizes;

-- scarce --
SELECT * INTO found FROM {>sizes} AS sizes;
  IF {lists_unused} AND found.memory > {most_memory} THEN
    RAISE WARNING USING MESSAGE = pg_catalog.format({slower|literal}, found.memory / 1024, {most_memory} / 1024),
      HINT = 'If the server can spare it: OM_INDEX_MEMORY=' || found.memory / 1024 + 1 || 'MB.';
  ELSIF found.lists > 0 AND found.lists < found.wanted THEN
    RAISE WARNING USING MESSAGE = pg_catalog.format({fewer_lists|literal}, found.lists, found.wanted,
                                                    {most_memory} / 1024, found.needed / 1024),
      HINT = 'If the server can spare it: OM_INDEX_MEMORY=' || found.needed / 1024 + 1
        || 'MB, then: ' || {index_anew} || ' --rebuild.';
  ELSIF found.lists = 0 AND found.wanted > 0 THEN
    RAISE WARNING USING MESSAGE = 'no index: ' || pg_catalog.format({not_one_list|literal}, found.least / 1024);
  END IF;

-- create --
SELECT pg_catalog.format({statement}, {quoted_name}, lists)
FROM {>sizes} AS sizes, pg_extension JOIN pg_namespace n ON n.oid = extnamespace
WHERE extname = 'vector' AND pg_catalog.to_regclass({index_text|literal}) IS NULL AND lists > 0
  AND pg_catalog.string_to_array(pg_catalog.regexp_replace(extversion, '[^0-9.]', '', 'g'), '.')::integer[]
      OPERATOR(pg_catalog.>=) {version}

-- each --
-- all of them first: a query that is still being read keeps its table from CREATE INDEX
FOR attempt IN 1..{tries} LOOP
    BEGIN
      FOREACH statement IN ARRAY ARRAY({query}) LOOP
        EXECUTE statement;
      END LOOP;
      EXIT;
    {>again}
  END LOOP;

-- gexec --
-- the same by psql, unless a block before it has failed, which psql may have gone on after
SELECT statement FROM ({query}) AS statements (statement)
WHERE pg_catalog.current_setting('openmemory.step', true) OPERATOR(pg_catalog.=) {reached|literal}
\gexec

-- all_done --
IF EXISTS ({query}) THEN
    RAISE EXCEPTION 'a statement of this step has failed' USING HINT = 'Mend that, then run this step again.';
  END IF;

-- waiting --
IF EXISTS ({query}) AND ({long_holders}) IS NOT NULL THEN
    RAISE NOTICE 'dropping an index has to wait until transactions that have locked the table are over'
      USING DETAIL = ({long_holders}) || '.';
  END IF;

-- drop --
SELECT 'DROP INDEX {concurrently}' || {schema_shown} || '.' || pg_catalog.quote_ident(CAST(found.name AS text)) FROM ({>db.own_indexes}) AS found

-- drop_invalid --
{>drop} WHERE NOT found.valid

-- drop_duplicate --
{>drop} WHERE found.name IN ({>index.duplicate})

-- column_size --
coalesce((SELECT nullif(atttypmod, -1) FROM pg_catalog.pg_attribute
          WHERE attrelid = CAST({table_text|literal} AS regclass) AND attname = {vector_text|literal}),
         pg_catalog.array_length(pg_catalog.string_to_array(CAST({vector} AS text), ','), 1))
