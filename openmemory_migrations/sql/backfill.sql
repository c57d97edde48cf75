-- of backfill/claims.py

-- claim --
SELECT number FROM pg_catalog.unnest(CAST(:numbers AS integer[])) AS number
WHERE pg_catalog.pg_try_advisory_xact_lock(CAST(:space AS integer), number)

-- claimed --
SELECT CAST(classid AS bigint), CAST(objid AS bigint) FROM pg_catalog.pg_locks
WHERE locktype = 'advisory' AND objsubid = 2 AND granted
  AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())

-- of backfill/client.py

-- unlocked_rows --
SELECT CAST(ctid AS text) FROM ONLY {table} WHERE ctid = ANY (CAST(CAST(:tids AS text[]) AS tid[]))
FOR NO KEY UPDATE SKIP LOCKED

-- of backfill/pace.py

-- look --
SELECT count(*), CAST(pg_current_wal_lsn() - '0/0' AS bigint),
       CAST(min(coalesce(replay_lsn, '0/0')) - '0/0' AS bigint)
FROM pg_catalog.pg_stat_replication WHERE state IN ('streaming', 'catchup')

-- kept --
-- by the slot that keeps the most
SELECT CAST(slot_name AS text), CAST(pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn) AS bigint),
       CAST(pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), '0/0') AS bigint)
FROM pg_catalog.pg_replication_slots WHERE restart_lsn IS NOT NULL AND wal_status <> 'lost' ORDER BY restart_lsn LIMIT 1

-- of backfill/dead_rows.py

-- autovacuum --
-- of the tables that hold the rows: how many it leaves alone, at how many dead rows of all it begins, how often it looks
SELECT count(*) FILTER (WHERE NOT (current_setting('autovacuum')::boolean AND coalesce(own.enabled, true))),
       CAST(sum(least(coalesce(own.threshold, CAST(current_setting('autovacuum_vacuum_threshold') AS double precision))
                      + coalesce(own.factor, CAST(current_setting('autovacuum_vacuum_scale_factor') AS double precision)) * greatest(c.reltuples, 0),
                      nullif(coalesce(own.most, CAST(current_setting('autovacuum_vacuum_max_threshold', true) AS double precision)), -1)))
            AS bigint),
       current_setting('autovacuum_naptime')
FROM pg_catalog.pg_class c,
     LATERAL (SELECT CAST(max(value) FILTER (WHERE name = 'autovacuum_enabled') AS boolean) AS enabled,
                     CAST(max(value) FILTER (WHERE name = 'autovacuum_vacuum_threshold') AS double precision) AS threshold,
                     CAST(max(value) FILTER (WHERE name = 'autovacuum_vacuum_scale_factor') AS double precision) AS factor,
                     CAST(max(value) FILTER (WHERE name = 'autovacuum_vacuum_max_threshold') AS double precision) AS most
              FROM pg_catalog.pg_options_to_table(c.reloptions) AS o (name, value)) AS own
WHERE c.oid = ANY (:tables)

-- of backfill/reader.py

-- pages_of --
SELECT pg_catalog.pg_relation_size(CAST(:table AS regclass))
       / CAST(current_setting('block_size') AS integer)

-- of backfill/stage.py

-- update_from_stage --
UPDATE ONLY {table} AS t SET {written} = s.element
FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.versions), pg_catalog.unnest(NEW.elements))
     AS s (tid, version, element)
WHERE t.ctid = s.tid AND t.xmin = s.version AND pg_catalog.pg_relation_filenode({table_text|literal}::regclass) = NEW.filenode

-- before_update --
old AS MATERIALIZED (
  SELECT o.ctid AS was_at, o.{read} AS was
  FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.versions)) AS s (tid, version)
       JOIN ONLY {table} AS o ON o.ctid = s.tid AND o.xmin = s.version),

-- lock_staged --
-- what is locked nobody else can move
PERFORM FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.versions)) AS s (tid, version)
             JOIN ONLY {table} AS o ON o.ctid = s.tid AND o.xmin = s.version
WHERE pg_catalog.pg_relation_filenode({table_text|literal}::regclass) = NEW.filenode FOR NO KEY UPDATE OF o;
GET DIAGNOSTICS chosen = ROW_COUNT;

-- triggers --
-- triggers that fire for our UPDATE
SELECT coalesce(bool_or(t.tgtype & 3 = 3), false), coalesce(bool_or(t.tgtype & 2 = 0), false)
FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = pg_catalog.to_regclass(:table) AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 16 <> 0
  AND (t.tgattr = CAST('' AS int2vector)
       -- one for a generated column fires where that is computed anew
       OR EXISTS (SELECT FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = t.tgrelid AND a.attnum = ANY (CAST(t.tgattr AS int2[]))
                    AND (a.attname = :written OR a.attgenerated <> '')))

-- of backfill/walk.py

-- next --
-- the last of so many: physical order is that in which ranges of places are read
SELECT CAST(max(tid) AS text), count(*)
FROM (SELECT ctid AS tid FROM ONLY {table} WHERE {inside} AND {pending}{order} LIMIT {most}) AS next

-- fill_all --
-- all of a batch, and whether that was right of each row: the new value is at hand then, the old one would be fetched
-- from out of line a second time to be looked at beforehand (an eighth of the time at 1,536 dimensions, measured)
WITH done AS (UPDATE ONLY {table} SET {filled} = {value} WHERE {inside} AND {pending} RETURNING {misfit} AS misfit)
SELECT count(*), coalesce(bool_or(misfit), false) FROM done

-- indexed --
-- a value that is not to be does harm there, though it is taken back; a generated column may have an index, too
SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute
               WHERE attrelid = pg_catalog.to_regclass(:table) AND attgenerated <> '' AND NOT attisdropped)
    OR EXISTS (SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid
               WHERE i.indrelid = pg_catalog.to_regclass(:table) AND a.attname = :column
                 AND (a.attnum = ANY (CAST(i.indkey AS int2[]))
                      OR EXISTS (SELECT FROM pg_catalog.pg_depend d
                                 WHERE d.classid = CAST('pg_catalog.pg_class' AS regclass) AND d.objid = i.indexrelid
                                   AND d.refclassid = d.classid AND d.refobjid = a.attrelid
                                   AND d.refobjsubid = a.attnum)))

-- count_without --
SELECT CASE WHEN {vector} IS NULL THEN {length} END, count(*), count(*) FILTER (WHERE {differs})
FROM {table} WHERE {source} IS NOT NULL GROUP BY 1

-- fill_among_triggers --
-- among triggers of others': with the bytes as they were, which none may change; the places of all that were chosen, as
-- nobody else can move those that are locked
WITH old AS MATERIALIZED (
  SELECT ctid AS om_at, {kept} AS om_was FROM ONLY {table} WHERE {which} AND {pending}{fit}
  FOR NO KEY UPDATE),
done AS (
  UPDATE ONLY {table} SET {filled} = {value} FROM old WHERE ctid = old.om_at
  RETURNING old.om_at, CAST(ctid AS text) AS tid, {kept_sum} AS sum,
            CASE WHEN NOT pg_catalog.record_image_eq(ROW({kept}), ROW(old.om_was)) THEN {overruled} END)
SELECT CAST(om_at AS text), tid, sum FROM done UNION ALL SELECT CAST(om_at AS text), NULL, NULL FROM old

-- filled_elsewhere --
-- what triggers have made of rows that are elsewhere since their UPDATE
WITH om_written AS (SELECT om_tid FROM unnest(CAST(CAST(:values AS text[]) AS tid[])) AS given (om_tid))
SELECT CAST(w.om_tid AS text), CAST(t.ctid AS text), {ok}, {kept_sum} FROM {>db.newest}

-- counted --
-- where nobody can change what is written, to look at it again would cost a batch 5 % (measured)
{>update_from_stage}; GET DIAGNOSTICS written = ROW_COUNT

-- compared --
{lock}WITH {before} done AS ({>update_from_stage}
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
    WITH om_written AS (
      SELECT s.tid AS om_tid, s.element AS om_element, r.sum AS om_sum
      FROM ROWS FROM (pg_catalog.unnest(NEW.tids), pg_catalog.unnest(NEW.elements)) AS s (tid, element)
           JOIN ROWS FROM (pg_catalog.unnest(were_at), pg_catalog.unnest(sums)) AS r (tid, sum) ON r.tid = s.tid)
    SELECT pg_catalog.count(*) FROM {>db.newest}
    WHERE pg_catalog.record_image_eq(ROW(t.{written}), ROW(w.om_element)) AND {sum} = w.om_sum);
END IF;
SET CONSTRAINTS ALL DEFERRED

-- create_stage_function --
-- (tid, xmin) names one version of one row as long as nobody rewrites the table, which then gets another file
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
    WHERE pg_catalog.pg_relation_filenode({table_text|literal}::regclass) = NEW.filenode;
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
