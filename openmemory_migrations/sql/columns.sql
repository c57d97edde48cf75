-- of columns/guard.py

-- create_guard_function --
-- SECURITY DEFINER: the writer may lack rights on what the extension has. A run that was killed may have left it: it names
-- nothing that may get another name since. Images are compared, as the operator of vectors takes 0 and -0 for equal
CREATE OR REPLACE FUNCTION {guard_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  IF TG_OP = 'UPDATE' AND {unchanged} THEN
    RETURN NULL;
  END IF;
  IF ({lost}) AND {at_work} THEN
    RAISE EXCEPTION USING ERRCODE = 'object_in_use', MESSAGE = {message}, HINT = {hint};
  END IF;
  RETURN NULL;
END
{tag}

-- create_guard_trigger --
-- the condition makes it depend on the columns: whoever drops one while it is there is told so, and writes go on
CREATE OR REPLACE TRIGGER {guard} AFTER INSERT OR UPDATE ON {table}
FOR EACH ROW WHEN (NEW.{one} IS NOT NULL OR NEW.{other} IS NOT NULL) EXECUTE FUNCTION {guard_function}()

-- at_work --
EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
                               AND (pid, (classid::bigint << 32) + objid::bigint) IN ({held}))

-- guards --
-- what a run has left that guarded a change and was killed, by what it says of itself: the table, the trigger or its
-- schema may have got other names since
SELECT CAST(t.tgname AS text) AS tgname, t.tgfoid, CAST(CAST(t.tgfoid AS regprocedure) AS text) AS function
FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = pg_catalog.to_regclass({table_shown}) AND t.tgparentid = 0
  AND pg_catalog.obj_description(t.oid, 'pg_trigger') = {guard_mark}
ORDER BY 1

-- of columns/properties.py

-- attributes --
-- nothing is bound: it is asked under another standard_conforming_strings than the session began with
SELECT a.attrelid, a.attnotnull, pg_catalog.pg_get_expr(d.adbin, d.adrelid),
       pg_catalog.col_description(a.attrelid, a.attnum), CAST(a.attstorage AS text), CAST(a.attcompression AS text),
       a.attstattarget, a.attacl IS NOT NULL, coalesce(a.attoptions, ARRAY[]::text[]), n.conname,
       pg_catalog.obj_description(n.oid, 'pg_constraint')
FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
     LEFT JOIN pg_catalog.pg_constraint n ON n.conrelid = a.attrelid AND n.contype = 'n' AND n.conkey[1] = a.attnum
WHERE a.attrelid = CAST({table_text} AS regclass) AND a.attname = {column_text} AND NOT a.attisdropped

-- grants --
SELECT a.attrelid, CASE g.grantee WHEN 0 THEN NULL ELSE pg_catalog.pg_get_userbyid(g.grantee) END,
       g.privilege_type, g.is_grantable, CASE WHEN g.grantor <> c.relowner THEN pg_catalog.pg_get_userbyid(g.grantor) END
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid, pg_catalog.aclexplode(a.attacl) g
WHERE a.attrelid = ANY (:tables) AND a.attname = :column AND NOT a.attisdropped
ORDER BY 2 NULLS FIRST, 3, 5 NULLS FIRST

-- dependents --
-- what would be left behind by a column that goes: deptype i and P are part of something else that is listed itself
SELECT DISTINCT pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid)
FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE d.refclassid = CAST('pg_class' AS regclass) AND d.refobjid = ANY (:tables) AND a.attname = :column
  AND d.deptype IN ('n', 'a')
  AND NOT (d.classid = CAST('pg_attrdef' AS regclass)
           AND EXISTS (SELECT FROM pg_catalog.pg_attrdef f WHERE f.oid = d.objid AND f.adnum = d.refobjsubid))
  AND NOT (d.classid = CAST('pg_trigger' AS regclass)
           AND EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.oid = d.objid AND (t.tgname = ANY (:ours) OR NOT {>steps.theirs})))
  AND NOT (d.classid = CAST('pg_class' AS regclass)
           AND EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = d.objid AND c.relname = ANY (:ours)))
  AND NOT (d.classid = CAST('pg_constraint' AS regclass)
           AND EXISTS (SELECT FROM pg_catalog.pg_constraint c WHERE c.oid = d.objid
                       AND (c.contype = 'n' OR c.conname = ANY (:ours))))
ORDER BY 1

-- of_parts --
-- a partition may have what its parent hasn't: that neither goes over nor comes back
SELECT own.what || ' of ' || pg_catalog.pg_describe_object(CAST('pg_class' AS regclass), a.attrelid, a.attnum)
FROM unnest(CAST(:tables AS oid[])) AS t (oid)
     JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attname = {column_text}
     LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum,
     LATERAL (VALUES ('NOT NULL', a.attnotnull AND NOT {not_null}),
                     ('the default', pg_catalog.pg_get_expr(d.adbin, d.adrelid) <> {default_text})
             ) AS own (what, here)
WHERE own.here
ORDER BY 1
