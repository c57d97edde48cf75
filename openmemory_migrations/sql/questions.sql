-- what the steps and the scripts ask alike. Requirements give what does not hold, the first thing first: step and script
-- raise that one, `check` lists all. Statements are executed one after the other, under the lock on the table; Citus has
-- to be told of the DDL of a trigger

-- it --
SELECT c.oid, c.relkind, c.relispartition, c.reloftype, CAST(pg_catalog.pg_get_userbyid(c.relowner) AS text) AS owner
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE n.nspname = {schema_name} AND c.relname = {table_name}

-- tree --
-- the table, its partitions, and what else inherits from it
SELECT oid FROM it
  UNION ALL
  SELECT i.inhrelid FROM tree JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending

-- columns --
SELECT *, CASE WHEN is_vector THEN 'vector' ELSE pg_catalog.format_type(atttypid, -1) END AS type,
         is_vector AND pg_catalog.starts_with(comment, {own_mark}) AS ours,
         is_vector AND pg_catalog.starts_with(comment, {set_aside_mark}) AS set_aside
  FROM (
  SELECT CAST(a.attname AS text) AS attname, a.attnum, a.attgenerated, a.attnotnull, a.atttypid, a.atttypmod,
         t.typname = 'vector' AND e.oid IS NOT NULL AS is_vector,
         coalesce(pg_catalog.col_description(a.attrelid, a.attnum), '') AS comment
  FROM it JOIN pg_catalog.pg_attribute a ON a.attrelid = it.oid JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
       LEFT JOIN pg_catalog.pg_extension e ON e.extname = 'vector' AND e.extnamespace = t.typnamespace
  WHERE a.attnum > 0 AND NOT a.attisdropped) AS its

-- table --
-- a table that was cut over may have no source
WITH RECURSIVE it AS MATERIALIZED (
  {>it}),
tree (oid) AS (
  {>tree}),
parts AS MATERIALIZED (
  SELECT c.relkind, '"' || CAST(n.nspname AS text) || '.' || CAST(c.relname AS text) || '"' AS shown, pg_catalog.row_security_active(c.oid) AS hidden
  FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace),
columns AS MATERIALIZED (
  {>columns}),
source AS (
  SELECT s.* FROM it LEFT JOIN columns s ON s.attname = {source_name}
  WHERE it.relkind IN ('r', 'p')
    AND NOT EXISTS (SELECT FROM columns WHERE attname IN ({source_name}, {vector_name}) AND is_vector
                    AND pg_catalog.starts_with(comment, {cut_over_mark})))
SELECT code, 'error' AS severity, message, detail, hint FROM (
  SELECT 1 AS place, 'table' AS code, 'table ' || {itself} || ' does not exist' AS message, NULL AS detail,
         'Set OM_PG_SCHEMA and OM_VECTOR_TABLE as OpenMemory has them; it creates the table when it starts.' AS hint
  WHERE NOT EXISTS (SELECT FROM it)
  UNION ALL
  SELECT 2, 'table', {itself} || ' is a partition', NULL,
         'Set OM_VECTOR_TABLE to the table that it is a partition of.'
  FROM it WHERE relispartition
  UNION ALL
  SELECT 3, 'table',
         {itself} || CASE relkind WHEN 'v' THEN ' is a view' WHEN 'm' THEN ' is a materialized view'
                                  WHEN 'f' THEN ' is a foreign table' WHEN 'r' THEN ' is a table that others inherit from'
                                  ELSE ' is no table' END,
         NULL, 'Only an ordinary or a partitioned table can be migrated.'
  FROM it
  WHERE NOT relispartition AND relkind <> 'p'
    AND (relkind <> 'r' OR EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = it.oid))
  UNION ALL
  SELECT 4, 'table', 'partition ' || shown || ' of ' || {itself} || ' is a foreign table', NULL,
         'Only tables of this server can be migrated; detach it, or migrate it where it is.'
  FROM parts WHERE relkind NOT IN ('r', 'p') AND EXISTS (SELECT FROM it WHERE it.relkind = 'p')
  UNION ALL
  SELECT 5, 'table', 'table ' || {itself} || ' has no column ' || {source_shown},
         'Its columns are ' || (SELECT pg_catalog.string_agg('"' || pg_catalog.replace(attname, '"', '""') || '"', ', ' ORDER BY attnum)
                                FROM columns) || '.',
         'Set OM_PG_SCHEMA and OM_VECTOR_TABLE to the table that OpenMemory writes its vectors to.'
  FROM source WHERE attname IS NULL
  UNION ALL
  SELECT 6, 'table', 'column ' || {source_shown} || ' of ' || {itself} || ' is of type ' || type, NULL,
         'Expected bytea (float32, little-endian), as OpenMemory creates it.'
  FROM source WHERE type <> 'bytea' AND NOT is_vector
  UNION ALL
  SELECT 7, 'table', 'row-level security of ' || shown || ' would hide rows from this role', NULL,
         'Connect as a role that bypasses it: the owner (without FORCE), one with BYPASSRLS, a superuser.'
  FROM parts WHERE hidden) AS unmet
ORDER BY place, message

-- server --
-- that anything can be changed there
SELECT code, 'error' AS severity, message, CAST(NULL AS text) AS detail, hint FROM (
  SELECT 1 AS place, 'standby' AS code, 'this server is a standby, where nothing can be changed' AS message,
         'Set OM_DATABASE_URL, or OM_PG_HOST and OM_PG_PORT, to the primary.' AS hint
  WHERE pg_catalog.pg_is_in_recovery()
  UNION ALL
  SELECT 2, 'read-only', 'transactions of this role are read-only in this database',
         'SET default_transaction_read_only = off; ALTER ROLE CURRENT_USER SET default_transaction_read_only = off;'
  WHERE NOT pg_catalog.pg_is_in_recovery() AND pg_catalog.current_setting('default_transaction_read_only') = 'on') AS unmet
ORDER BY place

-- rights --
-- of the first step: to add a column and a trigger, or that which guards the way back, whose function is to belong to the
-- owner of the table: what a role makes that loses its membership would fail the owner's writes
WITH RECURSIVE it AS MATERIALIZED (
  {>it}),
tree (oid) AS (
  {>tree}),
parts AS MATERIALIZED (
  SELECT c.oid, c.relowner, CAST(n.nspname AS text) AS nspname, CAST(c.relname AS text) AS relname,
         CAST(pg_catalog.pg_get_userbyid(c.relowner) AS text) AS owner,
         pg_catalog.pg_has_role(c.relowner, 'USAGE') AS owned, pg_catalog.pg_has_role(c.relowner, 'MEMBER') AS is_member,
         pg_catalog.pg_has_role(c.relowner, {>set_role}) AS may_set
  FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace),
who AS (SELECT '"' || pg_catalog.replace(CAST(current_user AS text), '"', '""') || '"' AS role,
               '"' || pg_catalog.replace(CAST(session_user AS text), '"', '""') || '"' AS login,
               '"' || pg_catalog.replace(owner, '"', '""') || '"' AS owner FROM it)
SELECT code, 'error' AS severity, message, detail, hint FROM (
  SELECT 1 AS place, 'rights' AS code, 'role ' || who.role || ' does not own table ' || {itself} AS message,
         CASE WHEN is_member THEN 'It is a member of ' || who.owner || ', whose rights it does not inherit.'
              ELSE 'Only its owner, ' || who.owner || ', or a member of that role can add a column and a trigger.' END AS detail,
         CASE WHEN is_member THEN 'ALTER ROLE ' || who.login || ' SET ROLE ' || who.owner || '; or SET ROLE in env.py.'
              ELSE 'Connect as ' || who.owner || ', or: GRANT ' || who.owner || ' TO ' || who.role || ';' END AS hint
  FROM parts JOIN it USING (oid), who WHERE NOT owned
  UNION ALL
  SELECT 2, 'rights',
         'role ' || who.role || ' does not own partition "' || nspname || '.' || relname || '" of ' || {itself},
         'It belongs to "' || pg_catalog.replace(parts.owner, '"', '""') || '"; a column is added to all partitions at once.',
         'ALTER TABLE "' || pg_catalog.replace(nspname, '"', '""') || '"."' || pg_catalog.replace(relname, '"', '""') || '" OWNER TO '
         || who.owner || ';'
  FROM parts, who WHERE NOT owned AND parts.oid <> (SELECT oid FROM it)
  UNION ALL
  SELECT 3, 'rights', 'role ' || who.role || ' may not SET ROLE ' || who.owner || ', which owns table ' || {itself},
         'What this package makes is to belong to the owner.',
         'GRANT ' || who.owner || ' TO ' || who.role || ' WITH SET TRUE;'
  FROM parts JOIN it USING (oid), who WHERE owned AND NOT may_set AND {functions}
  UNION ALL
  SELECT 4, 'rights', 'role ' || may.role || ' may not create functions in schema ' || {schema_shown}, may.detail,
         'GRANT CREATE ON SCHEMA ' || {schema_shown} || ' TO ' || may.role || ';'
  FROM parts JOIN it USING (oid), who,
       LATERAL (SELECT who.role, CAST(NULL AS text) AS detail
                WHERE NOT pg_catalog.has_schema_privilege({schema_name}, 'CREATE')
                UNION ALL
                SELECT who.owner, 'It owns table ' || {itself} || ', and so the function of its trigger.'
                WHERE who.owner <> who.role AND NOT pg_catalog.has_schema_privilege(relowner, {schema_name}, 'CREATE')) AS may
  WHERE {functions}
  UNION ALL
  SELECT 5, 'rights', 'role ' || who.owner || ', which owns table ' || {itself} || ', may not execute '
            || CAST(CAST(c.castfunc AS regprocedure) AS text),
         'The functions of triggers belong to it, and would fail every write.',
         'GRANT EXECUTE ON FUNCTION ' || CAST(CAST(c.castfunc AS regprocedure) AS text) || ' TO ' || who.owner || ';'
  FROM parts JOIN it USING (oid), who, pg_catalog.pg_extension e
       JOIN pg_catalog.pg_type t ON t.typname = 'vector' AND t.typnamespace = e.extnamespace
       JOIN pg_catalog.pg_cast c ON (c.castsource, c.casttarget) IN ((CAST('pg_catalog.float8[]' AS regtype), t.oid),
                                                                     (t.oid, CAST('pg_catalog.float4[]' AS regtype)))
  WHERE e.extname = 'vector' AND {sync_trigger} AND NOT pg_catalog.has_function_privilege(relowner, c.castfunc, 'EXECUTE')
  UNION ALL
  SELECT 6, code, message, detail, hint FROM ({>own_function}) AS its
  UNION ALL
  SELECT 7, 'function-taken', 'function ' || {sync_call} || ' is that of a trigger on ' || CAST(CAST(t.tgrelid AS regclass) AS text),
         'That table had the name of ' || {itself} || ' before, or somebody else has made a function of that name.',
         'Give that function another name: ALTER FUNCTION ' || {sync_call} || ' RENAME TO another;'
  FROM pg_catalog.pg_trigger t
  WHERE t.tgfoid = pg_catalog.to_regprocedure({sync_call}) AND t.tgparentid = 0
    AND (t.tgrelid NOT IN (SELECT oid FROM it) OR t.tgname <> {sync_name}) AND {sync_trigger}
  UNION ALL
  SELECT 9, 'trigger-taken', 'trigger "' || pg_catalog.replace(CAST(t.tgname AS text), '"', '""') || '" of ' || {itself} || ' is not this package''s',
         'It calls ' || CAST(CAST(t.tgfoid AS regprocedure) AS text) || '.',
         'ALTER TRIGGER "' || pg_catalog.replace(CAST(t.tgname AS text), '"', '""') || '" ON ' || {table_shown} || ' RENAME TO another;'
  FROM it JOIN pg_catalog.pg_trigger t ON t.tgrelid = it.oid AND t.tgname = {sync_name} AND NOT t.tgisinternal
  WHERE {sync_trigger} AND {>others_trigger}
  UNION ALL
  SELECT 8, 'function-taken', 'function ' || {sync_call} || ' is no function of a trigger',
         'This package makes one of that name.', 'ALTER FUNCTION ' || {sync_call} || ' RENAME TO another;'
  FROM pg_catalog.pg_proc
  WHERE oid = pg_catalog.to_regprocedure({sync_call}) AND {sync_trigger}
    AND (prokind <> 'f' OR prorettype <> CAST('pg_catalog.trigger' AS regtype))) AS unmet
ORDER BY place, message

-- others_trigger --
-- under a name of ours: without our mark, and with another function
pg_catalog.obj_description(t.oid, 'pg_trigger') IS DISTINCT FROM {own_mark} || {source_name}
  AND t.tgfoid IS DISTINCT FROM CAST(pg_catalog.to_regprocedure({sync_call}) AS oid)

-- own_function --
-- of the trigger: who replaces or drops it has to own it
SELECT 'rights' AS code, 'error' AS severity,
       'function ' || its.call || ' belongs to "' || pg_catalog.replace(its.owner, '"', '""') || '"' AS message, CAST(NULL AS text) AS detail,
       'Connect as that role, or: ALTER FUNCTION ' || its.call || ' OWNER TO "' || pg_catalog.replace(of_table.owner, '"', '""') || '";' AS hint
FROM ({>it}) AS of_table,
     (SELECT call, CAST(pg_catalog.pg_get_userbyid(proowner) AS text) AS owner
      FROM (VALUES ({sync_call}), ({back_call}), ({guard_call}), ({typing_call})) AS ours (call)
           JOIN pg_catalog.pg_proc ON oid = pg_catalog.to_regprocedure(call)
      WHERE NOT pg_catalog.pg_has_role(proowner, 'USAGE')) AS its

-- set_role --
-- before 16 every member may
CASE WHEN CAST(pg_catalog.current_setting('server_version_num') AS integer) < 160000 THEN 'MEMBER' ELSE 'SET' END

-- rules --
-- of the rows that there are, which an UPDATE could not be seen to change
WITH RECURSIVE it AS MATERIALIZED (
  {>it}),
tree (oid) AS (
  {>tree}),
found AS (
  SELECT CAST(CAST(r.ev_class AS regclass) AS text) AS on_table, '"' || pg_catalog.replace(CAST(r.rulename AS text), '"', '""') || '"' AS rule
  FROM tree JOIN pg_catalog.pg_rewrite r ON r.ev_class = tree.oid WHERE r.ev_type = '2' AND r.ev_enabled <> 'D')
SELECT 'rule' AS code, 'error' AS severity, 'rule ' || rule || ' on ' || on_table || ' rewrites each UPDATE' AS message,
       'It can''t be seen then what an UPDATE has written.' AS detail,
       'ALTER TABLE ' || on_table || ' DISABLE RULE ' || rule || '; and afterwards ENABLE.' AS hint
FROM found ORDER BY on_table, rule

-- extension --
WITH installed AS (
  SELECT CAST(n.nspname AS text) AS nspname, '"' || pg_catalog.replace(CAST(n.nspname AS text), '"', '""') || '"' AS shown
  FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector')
SELECT code, 'error' AS severity, message, detail, hint FROM (
  SELECT 1 AS place, 'extension-unavailable' AS code, 'extension "vector" is not available on this server' AS message,
         CAST(NULL AS text) AS detail,
         'Have an administrator install pgvector for this PostgreSQL, then: CREATE EXTENSION vector;' AS hint
  WHERE NOT EXISTS (SELECT FROM installed)
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_available_extensions WHERE name = 'vector')
  UNION ALL
  SELECT 2, 'rights',
         'role "' || pg_catalog.replace(CAST(current_user AS text), '"', '""') || '" may not use schema ' || shown
         || ', where extension "vector" is', NULL,
         'GRANT USAGE ON SCHEMA ' || shown || ' TO "' || pg_catalog.replace(CAST(current_user AS text), '"', '""') || '";'
  FROM installed WHERE NOT pg_catalog.has_schema_privilege(nspname, 'USAGE')) AS unmet
ORDER BY place

-- home --
-- the schema that an extension which isn't there yet is created in: where Supabase keeps them, or public; never one of
-- the application's own
CASE WHEN pg_catalog.to_regnamespace('extensions') IS NULL THEN 'public' ELSE 'extensions' END

-- extension_creation --
-- by a superuser, or, where the administrators have called it trusted, by who may create in the database. A hosting
-- service may have other rules, so the step tries, and only `check` goes by this
SELECT 'extension-rights' AS code, 'error' AS severity,
       'role "' || pg_catalog.replace(CAST(current_user AS text), '"', '""') || '" may not create extension "vector"' AS message,
       CAST(NULL AS text) AS detail,
       'Have an administrator run: CREATE EXTENSION vector SCHEMA "' || {>home} || '";' AS hint
FROM pg_catalog.pg_available_extensions e
     JOIN pg_catalog.pg_available_extension_versions v ON v.name = e.name AND v.version = e.default_version
WHERE e.name = 'vector' AND NOT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'vector')
  AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
  AND NOT (v.trusted AND pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE'))

-- source_column --
-- a column that is to follow it can be added, and is going to follow it
WITH it AS MATERIALIZED (
  {>it}),
columns AS MATERIALIZED (
  {>columns}),
followed AS (
  SELECT FROM it JOIN pg_catalog.pg_trigger t ON t.tgrelid = it.oid AND t.tgname = {sync_name})
SELECT code, 'error' AS severity, message, detail, hint FROM (
  SELECT 1 AS place, 'typed-table' AS code, {itself} || ' is a typed table, which gets no column of its own' AS message,
         CAST(NULL AS text) AS detail, 'ALTER TABLE ' || {table_shown} || ' NOT OF;' AS hint
  FROM it WHERE reloftype <> 0 AND NOT EXISTS (SELECT FROM columns WHERE attname = {vector_name} AND ours)
  UNION ALL
  SELECT 2, 'generated', 'column ' || {source_shown} || ' of ' || {itself} || ' is a generated column',
         'It has no value yet when a trigger fires, so nothing could keep vectors in step with it.',
         CASE attgenerated WHEN 's' THEN 'ALTER TABLE ' || {table_shown} || ' ALTER COLUMN ' || {source_shown}
                                         || ' DROP EXPRESSION; and have the application write it.'
              ELSE 'Make it an ordinary column, and have the application write it.' END
  FROM columns WHERE attname = {source_name} AND attgenerated <> '' AND {sync_trigger} AND NOT EXISTS (SELECT FROM followed)) AS unmet
ORDER BY place

-- vector_column --
-- ours can be added, and one of others' under its name set aside for it
WITH RECURSIVE it AS MATERIALIZED (
  {>it}),
tree (oid) AS (
  {>tree}),
columns AS MATERIALIZED (
  {>columns}),
other AS (
  SELECT * FROM columns
  WHERE attname = {vector_name} AND NOT ours),
views AS (
  SELECT pg_catalog.string_agg(DISTINCT CAST(CAST(w.ev_class AS regclass) AS text), ', ') AS names
  FROM tree JOIN pg_catalog.pg_depend d ON d.refobjid = tree.oid
       JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
       JOIN pg_catalog.pg_rewrite w ON w.oid = d.objid
  WHERE d.classid = CAST('pg_catalog.pg_rewrite' AS regclass)
    AND d.refclassid = CAST('pg_catalog.pg_class' AS regclass) AND a.attname = {vector_name}),
dependents AS (
  SELECT pg_catalog.string_agg(DISTINCT pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid), ', ') AS names
  FROM tree JOIN pg_catalog.pg_depend d ON d.refobjid = tree.oid
       JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
  WHERE d.refclassid = CAST('pg_catalog.pg_class' AS regclass) AND a.attname = {vector_name} AND d.deptype = 'n'
    AND d.classid <> CAST('pg_catalog.pg_rewrite' AS regclass))
SELECT code, 'error' AS severity, message, detail, hint FROM (
  SELECT 1 AS place, 'column-taken' AS code,
         'column ' || {vector_shown} || ' of ' || {itself} || ' is of type ' || type AS message, CAST(NULL AS text) AS detail,
         'Rename or drop that column: this package puts its vectors there.' AS hint
  FROM other WHERE NOT is_vector
  UNION ALL
  SELECT 2, 'column-taken',
         {itself} || ' has both ' || {vector_shown} || ' and ' || {adopted_shown} || ', neither made by this package',
         NULL,
         'Rename or drop ' || {adopted_shown} || ': the existing column is set aside under that name.'
  FROM other WHERE EXISTS (SELECT FROM columns WHERE attname = {adopted_name})
  UNION ALL
  SELECT 3, 'column-taken',
         'column ' || {vector_shown} || ' of ' || {itself} || ' can''t be replaced while views show it: ' || names,
         NULL, 'Drop them, run the same command again, and create them anew.'
  FROM other, views WHERE names IS NOT NULL
  UNION ALL
  SELECT 4, 'column-taken',
         'column ' || {vector_shown} || ' of ' || {itself} || ' can''t be replaced while something hangs on it: ' || names,
         NULL, 'Drop it, run the same command again, and create it anew.'
  FROM other, dependents WHERE names IS NOT NULL
  UNION ALL
  SELECT 5, 'column-taken', 'column ' || {vector_shown} || ' of ' || {itself} || ' is NOT NULL',
         'Until the backfill ends it is kept as ' || {adopted_shown} || ', which nobody writes: every write would fail.',
         'ALTER TABLE ' || {table_shown} || ' ALTER COLUMN ' || {vector_shown} || ' DROP NOT NULL;'
  FROM other WHERE attnotnull
  UNION ALL
  SELECT 6, 'column-copied',
         'column ' || {vector_shown} || ' of ' || {itself} || ' has the mark of this package, and the table no trigger of this package''s',
         'So has a copy (LIKE, INCLUDING COMMENTS), whose values nothing has kept in step since, or a table restored without its trigger.',
         'To have all values made anew: COMMENT ON COLUMN ' || {table_shown} || '.' || {vector_shown}
         || ' IS NULL; to keep them: openmemory-migrations repair, then openmemory-migrations verify.'
  FROM columns
  WHERE attname = {vector_name} AND ours AND {sync_trigger}
    AND NOT EXISTS (SELECT FROM it JOIN pg_catalog.pg_trigger t ON t.tgrelid = it.oid AND NOT t.tgisinternal
                    WHERE t.tgname = {sync_name} OR pg_catalog.obj_description(t.oid, 'pg_trigger') = {own_mark} || {source_name})) AS unmet
ORDER BY place, message

-- room --
-- for a column that is to be: a table has 1,600 in its life, and the places of dropped ones are gone
SELECT 'columns' AS code, CASE WHEN full_table THEN 'error' ELSE 'warning' END AS severity,
       '"' || name || '" has used ' || pg_catalog.to_char(relnatts, 'FM9,999') || ' of the 1,600 columns that a table can have' AS message,
       'Dropped ones count: each upgrade after a downgrade uses one more, and each undo of a cutover by drop.' AS detail,
       'A new table has them all: make one like this (INCLUDING ALL), copy the rows, and exchange the names.' AS hint
FROM (WITH RECURSIVE it AS MATERIALIZED (
        {>it}),
      tree (oid) AS (
        {>tree})
      SELECT c.relnatts, c.relnatts >= 1600 AS full_table, CAST(n.nspname AS text) || '.' || CAST(c.relname AS text) AS name
      FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
      WHERE c.relnatts > 1590) AS used

-- room_for_vector --
WITH it AS MATERIALIZED (
  {>it}),
columns AS MATERIALIZED (
  {>columns})
SELECT full_table.* FROM ({>room}) AS full_table
WHERE NOT EXISTS (SELECT FROM columns WHERE attname = {vector_name} AND ours)

-- ext --
SELECT '"' || pg_catalog.replace(CAST(n.nspname AS text), '"', '""') || '"' AS name
  FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'

-- drop_guards --
SELECT 1 AS place, 'DROP TRIGGER ' || pg_catalog.quote_ident(tgname) || ' ON ' || {table_shown} AS statement, true AS of_trigger
  FROM guards
  UNION ALL
  SELECT 2, 'DROP FUNCTION ' || function, false FROM guards

-- add_column --
WITH it AS MATERIALIZED (
  {>it}),
columns AS MATERIALIZED (
  {>columns}),
ext AS (
  {>ext}),
other AS (
  SELECT * FROM columns
  WHERE attname = {vector_name} AND NOT ours)
SELECT statement, of_trigger FROM (
  SELECT 1 AS place, {rename} AS statement, false AS of_trigger FROM other
  UNION ALL
  SELECT 2, {comment_adopted} || pg_catalog.quote_literal({set_aside_mark} || comment), false FROM other
  UNION ALL
  SELECT 3, pg_catalog.format({add}, name), false FROM ext
  WHERE EXISTS (SELECT FROM other) OR NOT EXISTS (SELECT FROM columns WHERE attname = {vector_name})
  UNION ALL
  SELECT 4, {comment_ours}, false) AS wanted
ORDER BY place

-- add_trigger --
WITH it AS MATERIALIZED (
  {>it})
SELECT statement, of_trigger FROM (
  SELECT 1 AS place, {create_sync} AS statement, false AS of_trigger
  UNION ALL
  SELECT 2, {revoke_sync}, false
  UNION ALL
  SELECT 3, {own_sync} || '"' || pg_catalog.replace(owner, '"', '""') || '"', false FROM it
  UNION ALL
  SELECT 4, {create_trigger}, true
  UNION ALL
  SELECT 5, {fire_always}, true
  UNION ALL
  SELECT 6, {comment_trigger}, false) AS wanted
ORDER BY place

-- own_versions --
-- whoever owns the table can read how far it is, and go on, when the role that has begun is gone
SELECT 'ALTER TABLE ' || {versions_shown} || ' OWNER TO "' || pg_catalog.replace(CAST(pg_catalog.pg_get_userbyid(c.relowner) AS text), '"', '""') || '"'
         AS statement, false AS of_trigger
FROM ({>it}) AS it JOIN pg_catalog.pg_class c ON c.oid = it.oid
     JOIN pg_catalog.pg_class v ON v.oid = pg_catalog.to_regclass({versions_shown})
WHERE v.relowner <> c.relowner AND pg_catalog.pg_has_role(v.relowner, 'USAGE')
  AND pg_catalog.pg_has_role(c.relowner, {>set_role}) AND pg_catalog.has_schema_privilege(c.relowner, v.relnamespace, 'CREATE')

-- remove_trigger --
-- with what a distributed table has had to convert its rows, and with what a partition has of its own, which was
-- migrated by itself and attached afterwards
WITH RECURSIVE it AS MATERIALIZED (
  {>it}),
tree (oid) AS (
  {>tree}),
guards AS MATERIALIZED (
  {>columns.guards}),
sync AS MATERIALIZED (
  SELECT t.tgname, t.tgfoid,
         CASE WHEN t.tgrelid = (SELECT oid FROM it) THEN {table_shown} ELSE CAST(CAST(t.tgrelid AS regclass) AS text) END AS on_table
  FROM tree JOIN pg_catalog.pg_trigger t ON t.tgrelid = tree.oid AND NOT t.tgisinternal AND t.tgparentid = 0
  WHERE t.tgname = {sync_name} AND t.tgrelid = (SELECT oid FROM it) AND NOT ({>others_trigger})
     OR pg_catalog.obj_description(t.oid, 'pg_trigger') = {comment})
SELECT statement, of_trigger FROM (
  {>drop_guards}
  UNION ALL
  SELECT 3, 'DROP TRIGGER "' || pg_catalog.replace(CAST(tgname AS text), '"', '""') || '" ON ' || on_table, true FROM sync
  UNION ALL
  SELECT 4, 'DROP FUNCTION ' || CAST(CAST(oid AS regprocedure) AS text), false
  FROM (SELECT tgfoid FROM sync UNION SELECT CAST(pg_catalog.to_regprocedure({sync_call}) AS oid)) AS its (oid)
  WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_trigger o WHERE o.tgfoid = its.oid
                    AND o.tgrelid NOT IN (SELECT relid FROM it, pg_catalog.pg_partition_tree(it.oid)) AND o.tgrelid <> (SELECT oid FROM it))
    AND oid IS NOT NULL
  UNION ALL
  SELECT 5, {drop_convert}, false WHERE pg_catalog.to_regprocedure({convert_call}) IS NOT NULL) AS wanted
ORDER BY place

-- remove_column --
-- ours, and one of others' that was set aside for it has its name again
WITH it AS MATERIALIZED (
  {>it}),
columns AS MATERIALIZED (
  {>columns}),
ours AS (
  SELECT FROM columns WHERE attname = {vector_name} AND ours),
aside AS (
  SELECT nullif(pg_catalog.substr(comment, pg_catalog.length({set_aside_mark}) + 1), '') AS comment FROM columns, ours
  WHERE attname = {adopted_name} AND set_aside)
SELECT statement, of_trigger FROM (
  SELECT 1 AS place, {drop_column} AS statement, false AS of_trigger FROM ours
  UNION ALL
  SELECT 2, {comment_adopted} || coalesce(pg_catalog.quote_literal(comment), 'NULL'), false FROM aside
  UNION ALL
  SELECT 3, {restore}, false FROM aside) AS wanted
ORDER BY place

-- remove_adopted --
-- the column that was set aside, once all that it has alone is in ours
WITH it AS MATERIALIZED (
  {>it}),
columns AS MATERIALIZED (
  {>columns}),
guards AS MATERIALIZED (
  {>columns.guards})
SELECT statement, of_trigger FROM (
  {>drop_guards}
  UNION ALL
  SELECT 3, {drop_adopted}, false FROM columns
  WHERE attname = {adopted_name} AND set_aside) AS wanted
ORDER BY place
