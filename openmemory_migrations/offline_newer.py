"""The SQL of the scripts for tables that newer OpenMemory made, whose `v` is a vector itself: as newer.py online.

Each block does nothing where `v` is something else. Every `{name}` is filled by offline.Script. Texts are frozen with
the first release.
"""

from __future__ import annotations

from typing import Any

from . import newer_column, switching
from .indexes import INDEX_DIMENSIONS
from .offline_sql import BATCHES, FIND_COLUMN, THESE_PAGES
from .target import GIVEN, TYPED, Target, literal, quote

IS_NEWER = """EXISTS (
    SELECT FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
    WHERE attrelid = to_regclass({table_text}) AND attname = {source_text} AND NOT attisdropped AND typname = 'vector'
      AND NOT coalesce(starts_with(col_description(attrelid, attnum), {mark_comment}), false))"""
DECLARE = """DECLARE
  extension text;
  found record;
  source record;
  was record;
  one record;
  number bigint;
  hanging text;"""
BEGIN = """PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);
  IF NOT {is_newer} THEN
    RETURN;
  END IF;
  {find_extension}
  {find_source}
  source := found;
  {find_typed}"""
REFUSE_DEPENDENTS = """hanging := (SELECT string_agg(it, ', ' ORDER BY it) FROM ({dependents}) AS d (it));
      IF hanging IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = {type_kept} || hanging,
          HINT = 'Drop that, run the script again, and create it anew.';
      END IF;"""
ATTRIBUTES = """SELECT attnotnull, pg_get_expr(adbin, adrelid) AS standard, attstorage::text AS storage,
             attcompression::text AS compression, coalesce(attstattarget, -1) AS statistics, attacl AS privileges,
             coalesce(regexp_replace(col_description(attrelid, attnum), '^' || {given}, ''), '') AS comment
        INTO was FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
       WHERE attrelid = {table_text}::regclass AND attname = {source_text};"""
STORE = """EXECUTE {alter} || ' SET STORAGE ' || CASE was.storage WHEN 'p' THEN 'PLAIN' WHEN 'e' THEN 'EXTERNAL'
                WHEN 'm' THEN 'MAIN' ELSE 'EXTENDED' END;
      IF was.compression IN ('p', 'l') THEN
        EXECUTE {alter} || ' SET COMPRESSION ' || CASE was.compression WHEN 'p' THEN 'pglz' ELSE 'lz4' END;
      END IF;
      IF was.statistics >= 0 THEN
        EXECUTE {alter} || ' SET STATISTICS ' || was.statistics;
      END IF;"""

EXPAND = """
DO {tag}
#variable_conflict use_column
{declare}
BEGIN
  {begin}
  IF source.type LIKE '%vector({size})' THEN
    RAISE NOTICE USING MESSAGE = {v_is} || source.type || ' already, nothing to do';
    RETURN;
  ELSIF source.type LIKE '%)' OR (found.ours AND found.type NOT LIKE '%vector({size})') THEN
    RAISE EXCEPTION USING MESSAGE = {v_is} || CASE WHEN found.ours THEN found.type ELSE source.type END || ' already',
      HINT = 'Set OM_VEC_DIM to the dimensions that it has.';
  END IF;
  EXECUTE replace({count_others}, {ext}, {quoted}) INTO number;
  IF number > 0 THEN
    EXECUTE replace({histogram}, {ext}, {quoted}) INTO hanging;
    RAISE EXCEPTION USING MESSAGE = number || {others}, DETAIL = 'Rows by dimensions: ' || hanging || '.',
      HINT = 'Correct OM_VEC_DIM; or delete those rows, or have them embedded anew.';
  END IF;
  IF found.type IS NOT NULL AND NOT found.ours AND EXISTS (SELECT FROM {table}) THEN
    RAISE EXCEPTION USING MESSAGE = {typed_taken},
      HINT = 'Rename or drop that column: one of that name is to take the place of the vectors.';
  END IF;
  PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;
      {refuse_dependents}
      {attributes}
      IF found.ours IS NOT TRUE AND NOT EXISTS (SELECT FROM {table}) THEN
        EXECUTE replace({give}, {ext}, {quoted});
        {store_source}
        EXECUTE {remark_source} || quote_literal({given} || was.comment);
        EXIT;
      END IF;
      EXECUTE replace({add_typed}, {ext}, {quoted});
      {store_typed}
      EXECUTE {remark_typed} || {typed_comment};
      {drop_typing}
      EXECUTE {create_function};
      EXECUTE {revoke};
      EXECUTE {create_trigger};
      EXECUTE {remark_trigger} || {typed_comment};
      EXIT;
    {again}
  END LOOP;
END
{tag};
"""

BACKFILL = """
DO {tag}
#variable_conflict use_column
{declare}
  total bigint;
  done bigint := 0;
  moved bigint;
  page bigint;
  last_page bigint;
  pages integer := 1;
  said timestamptz := clock_timestamp();
  wait text := {wait};
BEGIN
  {begin}
  IF source.type LIKE '%)' THEN
    RETURN;
  END IF;
  IF found.ours IS NOT TRUE OR found.type NOT LIKE '%vector({size})' THEN
    RAISE EXCEPTION USING MESSAGE = {no_typed}, HINT = 'First the part of the script that adds it.';
  END IF;
  SELECT count(*) INTO total FROM {table} WHERE {pending};
  LOOP
    {fill_pages}
    PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);
    EXIT WHEN NOT EXISTS (SELECT FROM {table} WHERE {pending});
  END LOOP;
  RAISE NOTICE USING MESSAGE = {dimensions_of} || done || ' of ' || total || ' rows';
  EXECUTE replace({count_different}, {ext}, {quoted}) INTO number;
  IF number > 0 THEN
    RAISE EXCEPTION USING MESSAGE = number || {different},
      DETAIL = 'Something writes past the trigger, or changes the value after it.';
  END IF;
  {attributes}
  FOR attempt IN 1..{tries} LOOP
    EXIT WHEN NOT was.attnotnull;
    BEGIN
      PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
      ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {left};
      ALTER TABLE {table} ADD CONSTRAINT {left} CHECK ({typed} IS NOT NULL) NOT VALID;
      EXIT;
    {again}
  END LOOP;
  {commit}
  IF was.attnotnull THEN
    PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true);
    ALTER TABLE {table} VALIDATE CONSTRAINT {left};
  END IF;
  {commit}
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
      LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;
      IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {table_text}::regclass AND tgname = {typing_text}
                     AND NOT tgisinternal AND tgenabled IN ('O', 'A')) THEN
        RAISE EXCEPTION USING MESSAGE = {no_trigger};
      END IF;
      {refuse_dependents}
      {attributes}
      {drop_typing}
      ALTER TABLE {table} DROP COLUMN {source};
      ALTER TABLE {table} RENAME COLUMN {typed} TO {source};
      IF was.attnotnull THEN
        ALTER TABLE {table} ALTER COLUMN {source} SET NOT NULL;
      END IF;
      ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {left};
      IF was.standard IS NOT NULL THEN
        EXECUTE {alter_source} || ' SET DEFAULT ' || was.standard;
      END IF;
      FOR one IN SELECT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END AS role,
                        privilege_type AS privilege, is_grantable AS grantable
                 FROM aclexplode(was.privileges) ORDER BY grantee <> 0, 1, 2 LOOP
        EXECUTE 'GRANT ' || one.privilege || ' (' || quote_ident({source_text}) || ') ON TABLE ' || {table_text}
                || ' TO ' || one.role || CASE WHEN one.grantable THEN ' WITH GRANT OPTION' ELSE '' END;
      END LOOP;
      {store_source}
      EXECUTE {remark_source} || quote_literal({given} || was.comment);
      EXIT;
    {again}
  END LOOP;
  {commit}
END
{tag};
"""

DOWNGRADE = """
DO {tag}
#variable_conflict use_column
{declare}
BEGIN
  {begin}
  PERFORM set_config('lock_timeout', '{lock_timeout}ms', true);
  FOR attempt IN 1..{tries} LOOP
    BEGIN
      LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;
      {drop_typing}
      IF found.ours THEN
        ALTER TABLE {table} DROP COLUMN {typed};
      END IF;
      IF source.ours THEN
        FOR one IN SELECT indexrelid::regclass AS name FROM ({ours}) AS found LOOP
          EXECUTE 'DROP INDEX ' || one.name;
        END LOOP;
        {refuse_dependents}
        {attributes}
        EXECUTE replace({take}, {ext}, {quoted});
        {store_source}
        EXECUTE {remark_source}
                || coalesce(quote_literal(nullif(was.comment, '')), 'NULL');
      END IF;
      EXIT;
    {again}
  END LOOP;
END
{tag};
"""

COUNT = """
DO {tag}
#variable_conflict use_column
DECLARE
  found record;
BEGIN
  PERFORM set_config('row_security', 'off', true), set_config('statement_timeout', '0', true),
          set_config('openmemory.rows', '', {local});
  IF NOT {is_newer} THEN
    RETURN;
  END IF;
  {find_source}
  {require_size}
  PERFORM set_config('openmemory.rows', (SELECT count(*) FROM {table} WHERE {source} IS NOT NULL)::text, {local});
  IF {size} > {most_indexed} THEN
    RAISE NOTICE 'newer OpenMemory''s own CREATE INDEX can''t work with more than {most_indexed} dimensions';
  END IF;
END
{tag};
"""


def names(target: Target, common: dict[str, Any], inner: dict[str, Any]) -> dict[str, Any]:
    """What the blocks need beside the names that all scripts have; `inner` is for what is executed as a string."""

    def sql(template: str) -> str:
        return literal(template.strip("\n").format_map(inner))

    source, typed = quote(target.source), quote(target.typed)
    tables = f"ARRAY[{common['table_text']}::regclass::oid]"
    dependents = switching.DEPENDENTS.strip().removesuffix("ORDER BY 1")
    for parameter, value in (
        (":tables", tables),
        (":column", literal(target.source)),
        (":ours", "ARRAY[{typing_text}]"),
    ):
        dependents = dependents.replace(parameter, value)
    found = {
        **common,
        "declare": DECLARE,
        "typing_text": literal(target.typing),
        "given": literal(GIVEN),
        "pending": newer_column.PENDING.format_map(inner),
        "typed_comment": literal(literal(TYPED + target.source)),
        "most_indexed": INDEX_DIMENSIONS,
        "v_is": literal(f"column {source} of {target} is of type "),
        "others": literal(f" rows of {target} hold vectors of other than {inner['size']} dimensions"),
        "typed_taken": literal(f"{target} has a column {typed} that is not this package's"),
        "no_typed": literal(f"{target} has no column {typed} of this package"),
        "no_trigger": literal(f"trigger {quote(target.typing)} of {target} has been disabled or dropped meanwhile"),
        "different": literal(f" rows of {target} have another {typed} than {source}"),
        "type_kept": literal(f"the type of {source} of {target} can't be changed while there is: "),
        "dimensions_of": literal(f"dimensions of {target.table}: "),
        "count_others": sql("SELECT count(*) FROM {table} WHERE {ext}.vector_dims({source}) <> {size}"),
        "histogram": sql(
            "SELECT string_agg(size || ': ' || rows, '; ' ORDER BY size)"
            " FROM (SELECT {ext}.vector_dims({source}) AS size, count(*) AS rows FROM {table}"
            " WHERE {source} IS NOT NULL GROUP BY 1) AS sizes"
        ),
        "count_different": sql(newer_column.COUNT_DIFFERENT),
        "give": sql("ALTER TABLE {table} ALTER COLUMN {source} TYPE {ext}.vector({size})"),
        "take": sql("ALTER TABLE {table} ALTER COLUMN {source} TYPE {ext}.vector"),
        "add_typed": sql("ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {typed} {ext}.vector({size})"),
        "remark_source": sql("COMMENT ON COLUMN {table}.{source} IS "),
        "remark_typed": sql("COMMENT ON COLUMN {table}.{typed} IS "),
        "remark_trigger": sql("COMMENT ON TRIGGER {typing} ON {table} IS "),
        "create_function": sql(newer_column.CREATE_FUNCTION),
        "revoke": sql("REVOKE ALL ON FUNCTION {typing_function}() FROM PUBLIC"),
        "create_trigger": sql(newer_column.CREATE_TRIGGER),
        "fill": sql(
            "UPDATE ONLY {table} SET {typed} = {source} WHERE ctid >= $1 AND ctid < $2 AND " + newer_column.PENDING
        ),
        "alter_source": sql("ALTER TABLE {table} ALTER COLUMN {source}"),
        "drop_typing": f"DROP TRIGGER IF EXISTS {inner['typing']} ON {inner['table']};\n"
        f"      DROP FUNCTION IF EXISTS {inner['typing_function']}();",
    }
    batches = {"label": found["dimensions_of"], "batch_statement": f"EXECUTE {found['fill']} USING {THESE_PAGES};"}
    found["fill_pages"] = BATCHES.format_map({**found, **batches})
    found["is_newer"] = IS_NEWER.format_map(found)
    found["dependents"] = dependents.format_map(found)
    for name, own, column in (("find_source", GIVEN, target.source), ("find_typed", TYPED, target.typed)):
        found[name] = FIND_COLUMN.format_map({**found, "own": literal(own), "vector_text": literal(column)})
    for name, column in (("store_source", source), ("store_typed", typed)):
        found[name] = STORE.format(alter=literal(f"ALTER TABLE {inner['table']} ALTER COLUMN {column}"))
    for name, part in (
        ("begin", BEGIN),
        ("attributes", ATTRIBUTES),
        ("refuse_dependents", REFUSE_DEPENDENTS),
    ):
        found[name] = part.format_map(found)
    return found
