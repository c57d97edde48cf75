-- of index/build.py

-- name_taken --
-- what keeps the index from its name, as a requirement
SELECT 'index-name' AS code, 'warning' AS severity,
       'no index: the name ' || {index_shown} || ' is taken by ' || taken.holder AS message,
       CAST(NULL AS text) AS detail, 'Rename that, then: ' || {index_anew} || '.' AS hint
FROM (SELECT CASE WHEN found.name IS NULL THEN 'something that is no index'
                  WHEN found.of_table IS DISTINCT FROM CAST({of_table} AS oid) THEN 'an index of another table'
                  ELSE 'a ' || found.method || ' index on ' || found.key
                       || CASE WHEN found.partial THEN ', for some of the rows' ELSE '' END END AS holder
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
           LEFT JOIN ({>db.indexes}) AS found ON found.in_schema = n.nspname AND found.name = c.relname
      WHERE n.nspname = {schema_name} AND c.relname = {index_name}
        AND NOT EXISTS (SELECT FROM ({>db.own_indexes}) AS own WHERE own.name = {index_name})) AS taken

-- duplicate --
-- the index under the second mirrored name, where it is the same as that under the first
SELECT other.name FROM ({>db.own_indexes}) AS own JOIN ({>db.own_indexes}) AS other USING (method, opclass)
WHERE own.name = {index_name} AND other.name = {mirrored_name} AND own.name <> other.name
  AND own.half IS NOT DISTINCT FROM other.half
  AND ({any_options} OR (SELECT pg_catalog.string_agg(o, ',' ORDER BY o) FROM pg_catalog.unnest(own.options) AS o)
                        = (SELECT pg_catalog.string_agg(o, ',' ORDER BY o) FROM pg_catalog.unnest(other.options) AS o))

-- overflows_half --
CASE WHEN {vector} IS NULL THEN false WHEN {ext}.vector_norm({vector}) < {limit} THEN false
     ELSE EXISTS (SELECT FROM unnest(CAST({vector} AS real[])) AS element WHERE abs(element) >= {limit}) END

-- memory --
-- kB: maintenance_work_mem, and the most that a build gets
SELECT pg_catalog.pg_size_bytes(pg_catalog.current_setting('maintenance_work_mem')) / 1024, {>most_memory}

-- most_memory --
-- what the machine bears can't be asked. shared_buffers, customarily a quarter of its memory, and a quarter of
-- effective_cache_size, customarily half of it or more, are the measure
(SELECT pg_catalog.max(pg_catalog.pg_size_bytes(pg_catalog.current_setting(name)) / divisor) / 1024
   FROM (VALUES ('maintenance_work_mem', 1), ('shared_buffers', 1), ('effective_cache_size', 4))
     AS asked (name, divisor))

-- of index/build_progress.py

-- waits --
SELECT shown FROM (
  SELECT xact_start AS since,
         pg_catalog.format('process %s ("%s", role %s, open since %s)', pid, application_name, usename,
                           pg_catalog.to_char(xact_start, 'HH24:MI:SS TZ')) AS shown
  FROM pg_catalog.pg_stat_activity
  WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL) AND xact_start < now() - interval '1 second'
  UNION ALL
  SELECT p.prepared, p.shown FROM ({>db.prepared}) AS p
  WHERE EXISTS (SELECT FROM pg_catalog.pg_locks l
                WHERE l.relation = :table AND l.pid IS NULL AND l.virtualtransaction = p.virtualtransaction
                  AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'ShareLock'))) AS found
ORDER BY since LIMIT 5

-- phase --
SELECT phase, blocks_done, blocks_total, tuples_done, tuples_total, lockers_done, lockers_total,
       current_locker_pid
FROM pg_catalog.pg_stat_progress_create_index WHERE relid = ANY (:tables) AND datname = current_database()

-- of index/partitioned.py

-- attached --
-- whatever its name: what the server has made for a new partition has another one than ours
SELECT n.nspname, c.relname
FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_index x ON x.indexrelid = i.inhrelid
     JOIN pg_catalog.pg_class c ON c.oid = x.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE x.indrelid = :part AND i.inhparent = to_regclass(:parent)
