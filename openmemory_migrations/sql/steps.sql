-- of steps/backfill.py

-- lost --
-- what would go with the adopted column: no vector has come from these bytes, or the value has been changed on its way
{adopted} IS NOT NULL AND CASE WHEN {source} IS NULL
  THEN {ext}.vector_send({vector}) IS DISTINCT FROM {ext}.vector_send({adopted}) ELSE {vector} IS NULL END

-- of steps/expand.py

-- count_lost --
SELECT count(*) FROM {table}
WHERE {vector} IS NOT NULL AND CASE WHEN {other_length} THEN true ELSE {not_finite} END AND {kept} IS NOT true

-- of steps/interference.py

-- theirs --
-- a partition that was migrated by itself has one of ours, under another name
NOT coalesce(pg_catalog.starts_with(pg_catalog.obj_description(t.oid, 'pg_trigger'), 'openmemory_migrations: '), false)

-- triggers --
-- BEFORE (2), ROW (1), of INSERT (4) or UPDATE (16); `elsewhere`: also of an UPDATE that doesn't fire ours. Of a
-- partition's clones the first is enough, that of the root if it is enabled
SELECT * FROM (
  SELECT DISTINCT ON (t.tgname, t.tgfoid, t.tgtype, t.tgattr)
         CAST(CAST(t.tgrelid AS regclass) AS text), t.tgname, t.tgname > CAST(:ours AS name) AS later,
         t.tgtype & 16 <> 0
         AND (t.tgattr = CAST('' AS int2vector)
              OR EXISTS (SELECT FROM pg_catalog.pg_attribute a
                         WHERE a.attrelid = t.tgrelid AND a.attnum = ANY (CAST(t.tgattr AS int2[]))
                           AND a.attname <> :source)) AS elsewhere,
         l.lanname, p.prosrc, encode(t.tgargs, 'escape')
  FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
       JOIN pg_catalog.pg_language l ON l.oid = p.prolang
  WHERE t.tgrelid = ANY (:tables) AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgname <> :ours AND {>theirs}
    AND t.tgtype & 3 = 3 AND t.tgtype & 20 <> 0
  ORDER BY t.tgname, t.tgfoid, t.tgtype, t.tgattr, t.tgparentid) AS found

-- of_rows --
-- of rows, before or after whatever is done to them
SELECT DISTINCT ON (t.tgname, t.tgfoid) CAST(CAST(t.tgrelid AS regclass) AS text), t.tgname, p.prosrc,
       CAST(CAST(p.oid AS regprocedure) AS text)
FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
     JOIN pg_catalog.pg_language l ON l.oid = p.prolang AND l.lanname = 'plpgsql'
WHERE t.tgrelid = ANY (:tables) AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 1 = 1
  AND NOT t.tgname = ANY (CAST(:ours AS name[])) AND {>theirs}
ORDER BY t.tgname, t.tgfoid, t.tgparentid

-- settable --
-- a column that can be set and that no trigger is for: ours, if it is there
SELECT a.attname FROM pg_catalog.pg_attribute a
WHERE a.attrelid = :table AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' AND a.attidentity <> 'a'
  AND (a.attname = :vector
       OR NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t
                      WHERE t.tgrelid = a.attrelid AND a.attnum = ANY (CAST(t.tgattr AS int2[]))))
ORDER BY a.attname <> :vector, a.attnum LIMIT 1

-- copied --
-- for a temporary copy of the table: triggers that fire, as they are there, and whether they see all rows of a statement
SELECT pg_catalog.replace(pg_catalog.pg_get_triggerdef(t.oid), ' ON ' || CAST(CAST(t.tgrelid AS regclass) AS text) || ' ',
                          ' ON ' || {copy_text} || ' '),
       l.lanname, p.prosrc, t.tgnewtable IS NOT NULL OR t.tgoldtable IS NOT NULL
FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid JOIN pg_catalog.pg_language l ON l.oid = p.prolang
WHERE t.tgrelid = :table AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND t.tgtype & 28 <> 0
  AND NOT t.tgname = ANY (CAST(:ours AS name[])) AND {>theirs}
ORDER BY t.tgname

-- others --
SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger t
               WHERE t.tgrelid = ANY (:tables) AND NOT t.tgisinternal AND t.tgenabled <> 'D'
                 AND NOT t.tgname = ANY (CAST(:ours AS name[])) AND {>theirs})

-- tried --
-- a few that hold rows, as far as that is known without reading them, first those with triggers of their own. No row is
-- deleted to be inserted again where rows of others hang on it, or a trigger (8) might do what no rollback takes back
SELECT c.oid, EXISTS (SELECT FROM pg_catalog.pg_constraint f WHERE f.contype = 'f' AND f.confrelid = ANY (:tables))
              OR EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = ANY (:tables) AND t.tgtype & 8 <> 0
                         AND NOT t.tgisinternal AND t.tgenabled <> 'D')
FROM pg_catalog.pg_class c
WHERE c.oid = ANY (:tables) AND c.relkind = 'r' AND pg_catalog.pg_relation_size(c.oid) > 0
ORDER BY NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t
                     WHERE t.tgrelid = c.oid AND t.tgparentid = 0 AND NOT t.tgisinternal AND t.tgenabled <> 'D'),
         c.reltuples DESC LIMIT 12

-- given --
SELECT a.attname, a.attidentity = 'a' FROM pg_catalog.pg_attribute a
WHERE a.attrelid = :table AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum

-- of steps/native_column.py

-- create_function --
-- A value of other dimensions fails the write, with pgvector's own error. Frozen with the first release.
CREATE OR REPLACE FUNCTION {typing_function}() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  NEW.{typed} := NEW.{source};
  RETURN NEW;
END
{tag}

-- create_trigger --
CREATE TRIGGER {typing} BEFORE INSERT OR UPDATE OF {source} ON {table}
FOR EACH ROW EXECUTE FUNCTION {typing_function}()

-- of steps/repair.py

-- working --
-- of a trigger as the catalogs have it, with its clones on partitions, and of its function; what that assigns becomes what
-- the column takes by a cast. The last two are no faults of what is written today
WITH RECURSIVE it AS MATERIALIZED (
  {>questions.it}),
tree (oid) AS (
  {>questions.tree}),
own AS (
  SELECT it.owner, t.tgname, '"' || pg_catalog.replace({trigger_name}, '"', '""') || '"' AS trigger,
         ARRAY(SELECT c.tgenabled FROM tree JOIN pg_catalog.pg_trigger c ON c.tgrelid = tree.oid AND c.tgname = t.tgname)
           AS enabled,
         t.tgtype = {fires}
           AND CASE WHEN {for_each} THEN t.tgqual IS NULL
                    ELSE pg_catalog.strpos(pg_catalog.pg_get_triggerdef(t.oid), ' WHEN ((old.' || pg_catalog.quote_ident({with_bytes})
                                           || ' IS NOT NULL)) ') > 0 END
           AND CAST(t.tgattr AS text) = (SELECT CAST(a.attnum AS text) FROM pg_catalog.pg_attribute a
                                         WHERE a.attrelid = it.oid AND a.attname = {of_column} AND NOT a.attisdropped)
           AND p.prosrc = {body} AND p.prosecdef = {definer}
           AND p.proconfig IS NOT DISTINCT FROM ARRAY['search_path=pg_catalog, pg_temp'] AS as_made,
         p.proowner, CAST(CAST(p.oid AS regprocedure) AS text) AS function,
         CAST(pg_catalog.pg_get_userbyid(p.proowner) AS text) AS of_function,
         (SELECT c.castfunc FROM pg_catalog.pg_extension e
          JOIN pg_catalog.pg_type v ON v.typname = 'vector' AND v.typnamespace = e.extnamespace
          JOIN pg_catalog.pg_cast c ON CASE WHEN {to_vector} THEN c.castsource = CAST('pg_catalog.float8[]' AS regtype) AND c.casttarget = v.oid
                                            ELSE c.castsource = v.oid AND c.casttarget = CAST('pg_catalog.float4[]' AS regtype) END
          WHERE e.extname = 'vector' AND {definer}) AS by_cast
  FROM it LEFT JOIN pg_catalog.pg_trigger t ON t.tgrelid = it.oid AND t.tgname = {trigger_name} AND NOT t.tgisinternal
       LEFT JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid)
SELECT 'trigger' AS code, CASE WHEN place < 4 THEN 'error' ELSE 'warning' END AS severity, message, detail, hint FROM (
  SELECT 1 AS place, 'trigger ' || trigger || ' of ' || {itself} || ' is ' || CASE WHEN tgname IS NULL THEN 'missing' ELSE 'disabled' END
           AS message, {without} AS detail, {repair} AS hint
  FROM own WHERE tgname IS NULL OR enabled && CAST(ARRAY['D', 'R'] AS "char"[])
  UNION ALL
  SELECT 2, 'trigger ' || trigger || ' of ' || {itself} || ', or its function, isn''t what this version makes it', {without}, {repair}
  FROM own WHERE tgname IS NOT NULL AND as_made IS NOT TRUE
  UNION ALL
  SELECT 3, 'role "' || pg_catalog.replace(of_function, '"', '""') || '", by which trigger ' || trigger || ' works, may not execute '
            || CAST(CAST(by_cast AS regprocedure) AS text), 'Every write fails.',
         'GRANT EXECUTE ON FUNCTION ' || CAST(CAST(by_cast AS regprocedure) AS text) || ' TO "' || pg_catalog.replace(of_function, '"', '""') || '";'
  FROM own WHERE NOT pg_catalog.has_function_privilege(proowner, by_cast, 'EXECUTE')
  UNION ALL
  SELECT 4, 'function ' || function || ' belongs to "' || pg_catalog.replace(of_function, '"', '""') || '", and table ' || {itself}
            || ' to "' || pg_catalog.replace(owner, '"', '""') || '"', 'Writes depend on the rights of a role that doesn''t own the table.', {repair}
  FROM own WHERE of_function <> owner
  UNION ALL
  SELECT 5, 'trigger ' || trigger || ' of ' || {itself} || ' isn''t ENABLE ALWAYS',
         'It doesn''t fire for what a subscription applies, nor where session_replication_role is replica.', {repair}
  FROM own WHERE enabled && CAST(ARRAY['O'] AS "char"[])) AS unmet
ORDER BY place

-- called --
-- what the trigger's function does with its numbers: a denormal, -0, 1, and the largest that there is
SELECT {ext}.vector_send(CAST(CAST('{-1.401298464324817e-45,-0,1,3.4028234663852886e38}' AS pg_catalog.float8[]) AS {ext}.vector))
       = pg_catalog.decode('0004000080000001800000003f8000007f7fffff', 'hex')
