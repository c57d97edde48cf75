-- of cutover/kept.py

-- kept_tables --
-- by its name and the oid of its table: either may have been renamed, and another table be in its place. No table has
-- that oid any more where both come from a dump
SELECT CAST(c.oid AS bigint)
FROM pg_catalog.pg_class c, pg_catalog.obj_description(c.oid, 'pg_class') AS said (comment),
     substring(said.comment FROM ', oid ([0-9]+)$') AS its (oid)
WHERE c.oid = pg_catalog.to_regclass(:name) AND starts_with(said.comment, :comment)
  AND (CAST(its.oid AS oid) = pg_catalog.to_regclass(:table)
       OR NOT EXISTS (SELECT FROM pg_catalog.pg_class t WHERE t.oid = CAST(its.oid AS oid) AND t.relkind IN ('r', 'p')))

-- following --
-- what would be deleted or changed along with a row, or would keep it; 8 is DELETE of a trigger, 4 of a rule, and a
-- partition's have parents
SELECT 'foreign key ' || quote_ident(c.conname) || ' of ' || CAST(CAST(c.conrelid AS regclass) AS text)
FROM pg_catalog.pg_constraint c
WHERE c.contype = 'f' AND c.confrelid = ANY (:tables) AND c.confdeltype IN ('c', 'n', 'd') AND c.conparentid = 0
UNION ALL
SELECT 'trigger ' || quote_ident(t.tgname) || ' on ' || CAST(CAST(t.tgrelid AS regclass) AS text)
FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = ANY (:tables) AND NOT t.tgisinternal AND t.tgparentid = 0 AND t.tgenabled IN ('O', 'A')
  AND t.tgtype & 8 <> 0
UNION ALL
SELECT 'rule ' || quote_ident(r.rulename) || ' on ' || CAST(CAST(r.ev_class AS regclass) AS text)
FROM pg_catalog.pg_rewrite r
WHERE r.ev_class = ANY (:tables) AND r.ev_type = '4' AND r.ev_enabled IN ('O', 'A')
ORDER BY 1

-- rights --
SELECT pg_catalog.has_table_privilege(k.oid, 'SELECT') AND NOT pg_catalog.row_security_active(k.oid),
       pg_catalog.pg_has_role(k.relowner, 'USAGE'), pg_catalog.pg_get_userbyid(k.relowner),
       pg_catalog.pg_get_userbyid(t.relowner), current_user
FROM pg_catalog.pg_class k, pg_catalog.pg_class t WHERE k.oid = :kept AND t.oid = pg_catalog.to_regclass(:table)

-- columns --
SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod) FROM pg_catalog.pg_attribute a
WHERE a.attrelid = CAST(:table AS regclass) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
ORDER BY a.attnum

-- units --
SELECT DISTINCT CAST((CAST(CAST(ctid AS text) AS point))[0] AS bigint) / {unit} * {unit} FROM ONLY {table}
WHERE {which} ORDER BY 1

-- named --
SELECT name FROM unnest(CAST(:names AS text[]), CAST(:oids AS oid[])) AS t (name, oid)
WHERE pg_catalog.to_regclass(name) IS DISTINCT FROM t.oid

-- of cutover/preparations.py

-- find_left --
-- WHERE has but half of kept.LEFT: from 17 on the server leaves `v IS NOT NULL` out where the column is NOT NULL; an
-- index for both would be of no use to it then, and it would read the table
SELECT n.nspname, c.relname
FROM unnest(CAST(:tables AS oid[]), CAST(:names AS text[])) AS t (oid, name)
     JOIN pg_catalog.pg_index i ON i.indrelid = t.oid JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = t.name

-- strayed --
-- what has kept its name when the table got another, and the line that gives it the one that it is looked for by
WITH own AS (
  SELECT CAST(:schema AS text) AS schema, CAST(:table AS text) AS table_name, CAST(:kept AS text) AS kept,
         CAST(:left AS text) AS proof, CAST(:vector AS text) AS vector, CAST(:oid AS text) AS oid,
         CAST(:comment AS text) AS comment)
SELECT 'table ' || CAST(CAST(c.oid AS regclass) AS text) || ', with rows that have left it',
       CASE WHEN c.relname = own.kept
            THEN pg_catalog.format('ALTER TABLE %I.%I SET SCHEMA %I', n.nspname, c.relname, own.schema)
            ELSE pg_catalog.format('ALTER TABLE %I.%I RENAME TO %I', n.nspname, c.relname, own.kept) END
FROM pg_catalog.pg_description d JOIN pg_catalog.pg_class c ON c.oid = d.objoid
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, own
WHERE d.classoid = CAST('pg_class' AS regclass) AND d.objsubid = 0
  AND starts_with(d.description, own.comment) AND substring(d.description FROM ', oid ([0-9]+)$') = own.oid
  AND (n.nspname, c.relname) IS DISTINCT FROM (own.schema, own.kept)
UNION ALL
SELECT 'constraint ' || quote_ident(conname) || ', which refuses rows without a vector',
       pg_catalog.format('ALTER TABLE %I.%I RENAME CONSTRAINT %I TO %I', own.schema, own.table_name, conname, own.proof)
FROM pg_catalog.pg_constraint, own
WHERE CAST(conrelid AS text) = own.oid AND contype = 'c' AND conname <> own.proof AND conname LIKE '%left'
  AND pg_catalog.pg_get_expr(conbin, conrelid) = '(' || quote_ident(own.vector) || ' IS NOT NULL)'
UNION ALL
SELECT 'index ' || quote_ident(c.relname),
       pg_catalog.format('ALTER INDEX %I.%I RENAME TO %I', own.schema, c.relname, own.proof)
FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid, own
WHERE CAST(i.indrelid AS text) = own.oid AND c.relname <> own.proof AND c.relname LIKE '%left'
  AND pg_catalog.pg_get_expr(i.indpred, i.indrelid) = '(' || quote_ident(own.vector) || ' IS NULL)'

-- move --
WITH gone AS (DELETE FROM {origin} WHERE {which} RETURNING {columns}),
     come AS (INSERT INTO {to} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM gone
              RETURNING {columns}, CAST(CAST(tableoid AS regclass) AS text) AS om_in, CAST(ctid AS text) AS om_at,
                        {sum} AS om_sum)
SELECT (SELECT pg_catalog.count(*) FROM gone),
       EXISTS (SELECT CAST(ROW({columns}) AS text) FROM gone EXCEPT ALL SELECT CAST(ROW({columns}) AS text) FROM come),
       pg_catalog.array_agg(om_in), pg_catalog.array_agg(om_at), pg_catalog.array_agg(om_sum) FROM come

-- whole --
-- once their triggers have fired, which may have written a row again, the newest version of which has its bytes
WITH om_written AS (
  SELECT * FROM unnest(CAST(CAST(:places AS text[]) AS tid[]), CAST(:sums AS text[])) AS given (om_tid, om_sum))
SELECT count(*) FROM {>db.newest}
WHERE {sum} IS NOT DISTINCT FROM w.om_sum
