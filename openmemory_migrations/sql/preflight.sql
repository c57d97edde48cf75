-- of preflight/activity.py

-- transactions --
-- with a snapshot or a write that CONCURRENTLY waits for, or a lock on the table; a run of ours gives way by itself
SELECT pid, application_name, usename, state, xact_start FROM pg_catalog.pg_stat_activity AS a
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
  AND application_name NOT LIKE :ours
  AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL
       OR EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.relation = ANY (:tables)))
  AND xact_start < clock_timestamp() - CAST(:seconds AS integer) * interval '1 second'
ORDER BY xact_start LIMIT {most}

-- vacuums --
SELECT p.pid, p.phase, CAST(CAST(p.relid AS regclass) AS text) FROM pg_catalog.pg_stat_progress_vacuum p
WHERE p.relid = ANY (:tables) AND p.datname = current_database() ORDER BY 1

-- connections --
-- the sums of pg_stat_database are for everybody to see; 16 brought a second reserve, which isn't ours either
SELECT CAST(current_setting('max_connections') AS integer),
       CAST((SELECT sum(numbackends) FROM pg_catalog.pg_stat_database) AS integer),
       CAST((SELECT sum(CAST(setting AS integer)) FROM pg_catalog.pg_settings
             WHERE name IN ('superuser_reserved_connections', 'reserved_connections')) AS integer),
       r.rolsuper, r.rolconnlimit,
       CAST((SELECT count(*) FROM pg_catalog.pg_stat_activity a WHERE a.usesysid = r.oid) AS integer),
       d.datconnlimit, pg_catalog.pg_stat_get_db_numbackends(d.oid)
FROM pg_catalog.pg_roles r, pg_catalog.pg_database d
WHERE r.rolname = current_user AND d.datname = current_database()

-- of preflight/rows.py

-- sizes --
SELECT CAST(coalesce(sum(pg_relation_size(c.oid)), 0) AS bigint),
       CAST(coalesce(sum(pg_indexes_size(c.oid)), 0) AS bigint),
       CAST(coalesce(sum(pg_total_relation_size(nullif(c.reltoastrelid, 0))), 0) AS bigint)
FROM pg_catalog.pg_class c WHERE c.oid = ANY (:tables)

-- not_valid --
-- what each UPDATE of a row is held against, and its row perhaps not; NOT ENFORCED came with 18
SELECT c.conrelid, c.conname,
       CASE c.contype WHEN 'c' THEN pg_catalog.pg_get_expr(c.conbin, c.conrelid)
                      ELSE pg_catalog.format('%I IS NOT NULL', a.attname) END
FROM pg_catalog.pg_constraint c
     LEFT JOIN pg_catalog.pg_attribute a ON c.contype = 'n' AND a.attrelid = c.conrelid AND a.attnum = c.conkey[1]
WHERE c.conrelid = ANY (:tables) AND c.contype IN ('c', 'n') AND NOT c.convalidated
  AND pg_catalog.to_jsonb(c) ->> 'conenforced' IS DISTINCT FROM 'false'
ORDER BY 1, 2

-- held --
SELECT count(*) FROM ONLY {table} WHERE {unconverted} AND ({holds}) IS FALSE

-- of preflight/state.py

-- runs --
-- a pooler keeps connections of runs that are over, and their names; one that is going on holds a lock between runs
SELECT pid, application_name, CAST(date_trunc('second', backend_start) AS text) FROM pg_catalog.pg_stat_activity a
WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE :ours
  AND (state IS DISTINCT FROM 'idle'
       OR EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.locktype = 'advisory'))
ORDER BY backend_start, pid

-- detected --
SELECT coalesce(bool_or(data_type LIKE 'vector%'), false) FROM information_schema.columns
WHERE table_schema = :schema AND table_name = :table AND column_name = :column

-- of preflight/trial.py

-- indexes --
-- none whose expressions run others' functions, here as whoever checks
SELECT pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', ' ORDER BY k.place), i.indisunique
FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
     JOIN pg_catalog.pg_am m ON m.oid = c.relam AND m.amname = 'btree',
     LATERAL pg_catalog.unnest(CAST(i.indkey AS pg_catalog.int2[])) WITH ORDINALITY AS k (attnum, place)
     JOIN pg_catalog.pg_attribute a ON a.attnum = k.attnum
WHERE i.indrelid = :table AND a.attrelid = i.indrelid AND i.indexprs IS NULL AND i.indpred IS NULL
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_opclass o
                  WHERE o.oid = ANY (CAST(i.indclass AS pg_catalog.oid[])) AND NOT o.opcdefault)
  AND k.place <= i.indnkeyatts
GROUP BY i.indexrelid, i.indisunique

-- fill --
INSERT INTO {copy} ({columns}) SELECT {columns} FROM {table}
WHERE {pending} IS NULL AND {of_length} LIMIT {rows}

-- lengths --
SELECT {length}, count(*), count(*) FILTER (WHERE {vector} IS NULL), count(*) FILTER (WHERE {differs})
FROM {table} GROUP BY 1
