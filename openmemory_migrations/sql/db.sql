-- of db/catalog.py

-- indexes --
-- `on_column` has all that is in it, or the casts of that to halfvec of `half` dimensions. What reloptions leaves out has
-- pgvector's defaults. Nothing here waits for who has locked an index. Names as the catalogs have them, whose own indexes
-- find them then
SELECT n.nspname AS in_schema, c.relname AS name, i.indrelid AS of_table,
       i.indisvalid AND i.indisready AS valid, CAST(am.amname AS text) AS method, CAST(op.opcname AS text) AS opclass,
       k.name AS on_column, k.half,
       coalesce(k.name || coalesce('::halfvec(' || CAST(k.half AS text) || ')', ''), pg_catalog.pg_get_indexdef(c.oid, 1, false)) AS key,
       pg_catalog.array_cat(c.reloptions, ARRAY(
         SELECT d.name || '=' || d.value
         FROM (VALUES ('ivfflat', 'lists', '100'), ('hnsw', 'm', '16'), ('hnsw', 'ef_construction', '64')) AS d (method, name, value)
         WHERE d.method = am.amname
           AND NOT EXISTS (SELECT FROM pg_catalog.unnest(c.reloptions) AS o (text)
                           WHERE pg_catalog.split_part(o.text, '=', 1) = d.name))) AS options,
       i.indpred IS NOT NULL AS partial, c.oid
FROM pg_catalog.pg_class c
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid
     JOIN pg_catalog.pg_am am ON am.oid = c.relam
     JOIN pg_catalog.pg_opclass op ON op.oid = i.indclass[0]
     LEFT JOIN LATERAL (
       SELECT CAST(a.attname AS text) AS name,
              CAST(pg_catalog.substring(cast_to.text, '^(?:.+[.])?halfvec[(]([0-9]+)[)]$') AS integer) AS half
       FROM pg_catalog.pg_attribute a,
            LATERAL (SELECT pg_catalog.pg_get_expr(i.indexprs, i.indrelid) AS text,
                            '(' || pg_catalog.quote_ident(CAST(a.attname AS text)) || ')::' AS of_column) AS expression,
            LATERAL (SELECT CASE WHEN i.indnatts = 1 AND pg_catalog.starts_with(expression.text, expression.of_column)
                                 THEN pg_catalog.substr(expression.text, pg_catalog.length(expression.of_column) + 1)
                            END AS text) AS cast_to
       WHERE a.attrelid = i.indrelid AND a.attnum > 0 AND NOT a.attisdropped
         AND (a.attnum = i.indkey[0] OR cast_to.text ~ '^(.+[.])?halfvec[(][0-9]+[)]$')
     ) AS k ON true

-- indexes_named --
SELECT * FROM (
  {>indexes}) AS found
WHERE in_schema = {schema_name} AND name IN ({index_names})

-- indexes_on --
SELECT * FROM (
  {>indexes}) AS found
WHERE of_table = CAST({of_table} AS oid)

-- with_sizes --
SELECT *, pg_catalog.pg_relation_size(oid) FROM ({found}) AS found ORDER BY name

-- own_indexes --
-- those that are ours: under one of these names, of all our vectors
SELECT * FROM (
  {>indexes}) AS found
WHERE in_schema = {schema_name} AND of_table = CAST({of_table} AS oid) AND name IN ({index_names})
  AND method IN ('ivfflat', 'hnsw') AND on_column = {vector_name} AND NOT partial

-- newest --
-- rows that this transaction has written, by their places (`om_written`, as w), and what triggers have made of each
-- since: its newest version, as t. A host's column may have any name but one that begins so
(SELECT w.*, pg_catalog.currtid2({table_text|literal}, w.om_tid) AS om_newest FROM om_written AS w OFFSET 0) AS w
JOIN ONLY {table} AS t ON t.ctid = w.om_newest

-- columns --
SELECT a.attname, pg_catalog.format_type(a.atttypid, -1), t.typname = 'vector' AND e.oid IS NOT NULL,
       a.atttypmod, pg_catalog.col_description(a.attrelid, a.attnum)
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
     LEFT JOIN pg_catalog.pg_extension e ON e.extname = 'vector' AND e.extnamespace = t.typnamespace
WHERE a.attrelid = :oid AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum

-- shared_functions --
-- of a table that had this one's name before
SELECT its.kind, its.name, c.oid
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace,
     (VALUES ('sync', CAST(:sync AS name)), ('back', CAST(:back AS name)), ('typing', CAST(:typing AS name)),
             ('guard', CAST(:guard AS name))) AS its (kind, name)
WHERE n.nspname = :schema AND c.relname = :name
  AND EXISTS (SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_trigger t ON t.tgfoid = p.oid
              WHERE p.pronamespace = n.oid AND p.proname = its.name AND t.tgparentid = 0 AND t.tgrelid <> c.oid)

-- indexes_of_ours --
-- with our mark, on our column
SELECT CAST(found.name AS text) FROM (
  {>indexes}) AS found
  JOIN pg_catalog.pg_class c ON c.oid = found.of_table
  JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = found.on_column
                                 AND pg_catalog.col_description(c.oid, a.attnum) = :comment
WHERE c.oid = CAST(pg_catalog.to_regclass({table_text}) AS oid) AND found.on_column = {vector_name}
  AND pg_catalog.obj_description(found.oid, 'pg_class') = :index_comment
  AND found.method IN ('ivfflat', 'hnsw') AND NOT found.partial

-- own_triggers --
-- of ours, by what they say of themselves
SELECT its.kind, CAST(t.tgname AS text), CAST(n.nspname AS text), CAST(p.proname AS text)
FROM (VALUES ('sync', :sync), ('back', :back), ('typing', :typing)) AS its (kind, comment)
     JOIN pg_catalog.pg_class c ON c.relname = :name
     JOIN pg_catalog.pg_namespace h ON h.oid = c.relnamespace AND h.nspname = :schema
     JOIN pg_catalog.pg_trigger t ON t.tgrelid = c.oid AND NOT t.tgisinternal
                                  AND pg_catalog.obj_description(t.oid, 'pg_trigger') = its.comment
     JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace

-- trigger_enabled --
SELECT bool_and(EXISTS (SELECT FROM pg_catalog.pg_trigger
                        WHERE tgrelid = t.oid AND tgname = :name AND NOT tgisinternal
                          AND tgenabled IN ('O', 'A')))
FROM unnest(CAST(:tables AS oid[])) AS t (oid)
     JOIN pg_catalog.pg_class USING (oid)  -- but for a partition that has been dropped just now

-- vector_oid --
SELECT t.oid FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_type t ON t.typnamespace = e.extnamespace
WHERE e.extname = 'vector' AND t.typname = 'vector'

-- extension --
SELECT n.nspname, e.extversion
FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
WHERE e.extname = 'vector'

-- table --
SELECT c.oid, c.relkind::text, pg_catalog.pg_get_userbyid(c.relowner),
       pg_catalog.pg_has_role(c.relowner, 'USAGE'),
       EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid), c.relispartition,
       pg_catalog.row_security_active(c.oid),
       ARRAY(SELECT a.attname::text
             FROM pg_catalog.pg_index k, unnest(k.indkey) WITH ORDINALITY AS p(attnum, position)
                  JOIN pg_catalog.pg_attribute a USING (attnum)
             WHERE k.indrelid = c.oid AND k.indisprimary AND a.attrelid = c.oid AND p.position <= k.indnkeyatts
             ORDER BY p.position)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relname = :name

-- of db/citus.py

-- distribution --
SELECT (SELECT count(*) FROM pg_catalog.pg_dist_shard s WHERE s.logicalrelid = p.logicalrelid)
FROM pg_catalog.pg_dist_partition p WHERE p.logicalrelid = CAST(CAST(:oid AS oid) AS regclass)

-- index_size --
SELECT coalesce(sum(CAST(result AS bigint)), 0) FROM run_command_on_shards(
  CAST(CAST(:oid AS oid) AS regclass),
  $command$SELECT coalesce(sum(pg_relation_size(i.indexrelid)), 0)
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam
  WHERE i.indrelid = '%s'::regclass AND a.amname IN ('ivfflat', 'hnsw')$command$)
WHERE success

-- pages_of_shards --
SELECT coalesce(max(CAST(result AS bigint)), 0) FROM run_command_on_shards(
  CAST(CAST(:oid AS oid) AS regclass),
  $command$SELECT pg_relation_size('%s'::regclass) / CAST(current_setting('block_size') AS bigint)$command$)
WHERE success

-- building --
SELECT string_agg(nodename || ': ' || result, '; ' ORDER BY nodename, nodeport) FROM run_command_on_workers(
  $command$SELECT count(*) || ' shards, ' || coalesce(round(100.0 * sum(tuples_done) / nullif(sum(tuples_total), 0)), 0)
                  || ' % of their rows' FROM pg_stat_progress_create_index WHERE datname = current_database()$command$)
WHERE success

-- of db/database.py

-- holders --
-- who has locked a table, or one of those below it, for so long: the oldest statement first, never its text
WITH RECURSIVE tree (oid) AS (
  SELECT CAST({of_table} AS oid)
  UNION
  SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid),
held AS (
  SELECT DISTINCT l.pid, a.application_name AS name, CAST(a.usename AS text) AS role, a.state, p.shown,
         coalesce(a.query_start, a.xact_start, p.prepared) AS since, a.usesysid IS NULL AS background,
         a.query LIKE '%(to prevent wraparound)' AS wraparound
  FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
       LEFT JOIN ({>prepared}) AS p ON l.pid IS NULL AND p.virtualtransaction = l.virtualtransaction
  WHERE l.relation IN (SELECT oid FROM tree) AND l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
    AND coalesce(a.xact_start < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => {seconds}), true))
SELECT coalesce(shown,
         CASE WHEN wraparound THEN pg_catalog.format('process %s (an autovacuum that prevents wraparound, and gives way to nobody', pid)
              WHEN background THEN pg_catalog.format('process %s (of the server itself, such as autovacuum', pid)
              ELSE pg_catalog.format('process %s ("%s", role %s, %s', pid, name, role, coalesce(state, 'state not visible'))
         END
         || CASE WHEN since IS NULL THEN ')'
                 ELSE pg_catalog.format(', query started %s)', pg_catalog.to_char(since, 'HH24:MI:SS TZ')) END) AS holder
FROM held ORDER BY since NULLS LAST LIMIT 5

-- prepared --
-- each goes on under the number of the session that has prepared it or, after a restart, under its own
SELECT x.prepared, l.virtualtransaction,
       pg_catalog.format('the prepared transaction %L (role %s, since %s), which ROLLBACK PREPARED %1$L ends', x.gid, x.owner,
                         pg_catalog.to_char(x.prepared, 'HH24:MI:SS TZ')) AS shown
FROM pg_catalog.pg_prepared_xacts x
     JOIN pg_catalog.pg_locks l ON l.locktype = 'transactionid' AND l.transactionid = x.transaction AND l.pid IS NULL
WHERE x.database = pg_catalog.current_database()

-- still_held --
SELECT EXISTS (SELECT FROM pg_catalog.pg_locks
               WHERE locktype = 'advisory' AND granted AND objsubid = 1 AND pid = :pid
                 AND (CAST(classid AS bigint) << 32) + CAST(objid AS bigint) = :key)

-- seen --
WITH RECURSIVE tree (oid, link) AS (
  SELECT CAST(pg_catalog.to_regclass(:table) AS oid), CAST(NULL AS xid)
  UNION ALL
  SELECT i.inhrelid, i.xmin
  FROM tree JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending)
SELECT CAST(tree.oid AS bigint), CAST(tree.link AS text), CAST(pg_catalog.pg_relation_filenode(tree.oid) AS bigint),
       (SELECT CAST(ROW(n.nspname, c.relname) AS text) FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = tree.oid),
       ARRAY(SELECT CAST(ROW(a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull) AS text)
             FROM pg_catalog.pg_attribute a WHERE a.attrelid = tree.oid AND a.attnum > 0 AND NOT a.attisdropped
             ORDER BY a.attnum),
       ARRAY(SELECT CAST(ROW(t.oid, t.xmin, p.oid, p.xmin) AS text)
             FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
             WHERE t.tgrelid = tree.oid AND NOT t.tgisinternal ORDER BY t.oid)
FROM tree
ORDER BY tree.link IS NULL DESC, tree.oid

-- not_locked --
SELECT EXISTS (SELECT FROM unnest(CAST(:tables AS bigint[])) AS seen (oid)
               WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.relation = seen.oid AND l.granted
                                 AND l.locktype = 'relation' AND l.pid = pg_catalog.pg_backend_pid()))

-- of db/locks.py

-- all_of_them --
-- a little later than that: of one table it says that a lock was in the way
SELECT set_config('statement_timeout', CAST(CAST(setting AS integer) + 100 AS text), true)
FROM pg_catalog.pg_settings WHERE name = 'lock_timeout' AND setting <> '0'

-- batch_timeout --
-- lock_timeout of a batch: in a deadlock it is we who give way
SELECT CAST(greatest(1, least({lock_timeout}, CAST(setting AS integer) / 2)) AS text) || 'ms'
FROM pg_catalog.pg_settings WHERE name = 'deadlock_timeout'

-- autovacuum --
-- a process without a role is the server's own: what it does is shown to some roles only
SELECT coalesce(max(s.setting::integer + {longer}), 0)
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid AND a.usesysid IS NULL,
     pg_catalog.pg_settings s
WHERE l.granted AND l.mode = 'ShareUpdateExclusiveLock' AND s.name = 'deadlock_timeout'
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND (l.relation = :oid OR l.relation IN (SELECT relid FROM pg_catalog.pg_partition_tree(CAST(:oid AS oid))))

-- lock_holders --
SELECT a.pid, a.application_name, a.backend_start
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND (l.classid::bigint << 32) + l.objid::bigint = :key

-- of db/partitions.py

-- being_detached --
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.format('%I.%I', p.nspname, r.relname)
FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace JOIN pg_catalog.pg_class r ON r.oid = i.inhparent
     JOIN pg_catalog.pg_namespace p ON p.oid = r.relnamespace
WHERE i.inhparent = ANY (:tables) AND i.inhdetachpending

-- parts --
WITH RECURSIVE tree (oid, parent, depth) AS (
  SELECT CAST(:oid AS oid), CAST(NULL AS oid), 0
  UNION ALL
  SELECT i.inhrelid, i.inhparent, depth + 1
  FROM tree JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending)
SELECT c.oid, tree.parent, n.nspname, c.relname, CAST(c.relkind AS text),
       pg_catalog.pg_get_userbyid(c.relowner), pg_catalog.pg_has_role(c.relowner, 'USAGE'),
       pg_catalog.row_security_active(c.oid)
FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY tree.depth, n.nspname, c.relname

-- of db/replication.py

-- triggers --
-- 16 is UPDATE; of a trigger that names columns only the vector's counts, which may not be there yet; a partition's are
-- clones of its parent's
SELECT CAST(CAST(t.tgrelid AS regclass) AS text), t.tgname FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = ANY (:tables) AND NOT t.tgisinternal AND t.tgparentid = 0 AND t.tgenabled IN ('O', 'A')
  AND t.tgname <> :ours AND t.tgtype & 16 <> 0
  AND coalesce(obj_description(t.oid, 'pg_trigger'), '') NOT LIKE 'openmemory_migrations: %'
  AND (t.tgattr = CAST('' AS int2vector)
       OR (SELECT a.attnum FROM pg_catalog.pg_attribute a WHERE a.attrelid = t.tgrelid AND a.attname = :vector)
          = ANY (CAST(t.tgattr AS int2[])))
ORDER BY 1, 2

-- publications --
-- a publication with a list of columns (15) doesn't send a new one; read by name, as 14 hasn't got it
SELECT DISTINCT t.pubname FROM pg_catalog.pg_publication_tables t
     JOIN pg_catalog.pg_class c ON c.relname = t.tablename
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = t.schemaname
WHERE c.oid = ANY (:tables)
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_publication_rel r JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid
                  WHERE p.pubname = t.pubname AND r.prrelid = ANY (:tables) AND to_jsonb(r) ->> 'prattrs' IS NOT NULL)
ORDER BY 1

-- slots --
SELECT slot_name, CAST(pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)) AS text)
FROM pg_catalog.pg_replication_slots WHERE NOT active AND restart_lsn IS NOT NULL ORDER BY 1
