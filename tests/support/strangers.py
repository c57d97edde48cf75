"""Functions and operators that anybody may create in a schema that others look names up in: each nearer, by the types
of its arguments, to a call than what is meant. They do what is meant, and the server's log says that they were called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openmemory_migrations
from tests.support.openmemory import Database

PACKAGE = Path(openmemory_migrations.__file__).parent
CALL = re.compile(r"\b([a-z][a-z0-9_]+)\(")
# fmt: off
OPERATORS = [*"=<>+-*/%^~&|", "<>", "<=", ">=", "||", "!~", "~~", "<<", ">>", "@>", "<@", "&&", "<->"]
TYPES = [
    "oid", "int2", "int4", "int8", "text", "name", "varchar", '"char"', "bool", "numeric", "float8", "regclass",
    "regtype", "regprocedure", "xid", "tid", "bytea", "int2vector", "oidvector", "text[]", "name[]", "oid[]", "int2[]",
    "int4[]", "int8[]", "tid[]", '"char"[]', "aclitem[]", "bytea[]", "json", "jsonb", "timestamptz", "interval",
]
SECOND = [
    "text", "int4", "int8", "oid", "name", "bool", "text[]", "oid[]", "name[]", "int2", "bytea", "float8", "regclass",
    "interval", '"char"',
]
# fmt: on
OF_VECTORS = ["text", "bytea", "varchar", "float8[]", "json"]  # which none of pgvector's functions has

# Whoever asks with these types means what pg_catalog finds for them, if that has other ones
CREATE = """
DO $strangers$
DECLARE
  types text[] := @types@;
  seconds text[] := @seconds@;
  meant text;
  found record;
  made integer := 0;
  say text := 'RAISE LOG ''%%'', $say$a stranger''s %s$say$;';
  declared text := ' LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $stranger$ BEGIN ';
BEGIN
  SET LOCAL check_function_bodies = off;
  SET LOCAL search_path = pg_catalog, pg_temp;
  types := types || (SELECT format('%I.vector', nspname) FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace
                     WHERE extname = 'vector');
  FOR found IN
    SELECT o.name, l.type AS first, r.type AS second
    FROM unnest(@operators@::text[]) AS o (name), unnest(types) AS l (type), unnest(types) AS r (type)
    WHERE l.type IS NOT NULL AND r.type IS NOT NULL
      AND NOT EXISTS (SELECT FROM pg_operator WHERE oprname = o.name AND oprleft = l.type::regtype
                      AND oprright = r.type::regtype)
  LOOP
    BEGIN
      EXECUTE format('SELECT pg_typeof(NULL::%s %s NULL::%s)', found.first, found.name, found.second) INTO meant;
    EXCEPTION WHEN OTHERS THEN
      CONTINUE;
    END;
    made := made + 1;
    EXECUTE format('CREATE FUNCTION @schema@.stranger_%s(%s, %s) RETURNS %s', made, found.first, found.second, meant)
      || declared || format(say, format('%s %s %s', found.first, found.name, found.second))
      || format('RETURN $1 %s $2; END $stranger$', found.name);
    EXECUTE format('CREATE OPERATOR @schema@.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = @schema@.stranger_%s)',
                   found.name, found.first, found.second, made);
  END LOOP;
  FOR found IN
    SELECT f.*, a.args FROM (
      SELECT p.proname AS name, bool_or(p.proretset) AS sets, bool_or(p.prokind = 'a') AS adds_up FROM pg_proc p
      WHERE p.proname = ANY (@calls@) AND p.prokind IN ('f', 'a') AND p.pronamespace = 'pg_catalog'::regnamespace
      GROUP BY 1) AS f,
      LATERAL (SELECT ARRAY[l.type] FROM unnest(types) AS l (type) WHERE l.type IS NOT NULL
               UNION ALL
               SELECT ARRAY[l.type, r.type] FROM unnest(types) AS l (type), unnest(seconds) AS r (type)
               WHERE l.type IS NOT NULL) AS a (args)
    WHERE NOT EXISTS (SELECT FROM pg_proc p WHERE p.proname = f.name
                      AND p.proargtypes = (SELECT string_agg(t.type::regtype::oid::text, ' ' ORDER BY t.n)
                                           FROM unnest(a.args) WITH ORDINALITY AS t (type, n))::oidvector)
  LOOP
    BEGIN
      EXECUTE format('SELECT pg_typeof(x) FROM (SELECT %I(%s)) AS t (x)', found.name,
        (SELECT string_agg('NULL::' || t.type, ', ') FROM unnest(found.args) AS t (type))) INTO meant;
      IF meant IS NULL THEN
        EXECUTE format('SELECT pg_typeof((SELECT %I(%s) LIMIT 1))', found.name,
          (SELECT string_agg('NULL::' || t.type, ', ') FROM unnest(found.args) AS t (type))) INTO meant;
      END IF;
      IF meant = 'void' THEN
        CONTINUE;
      END IF;
      EXECUTE format('CREATE FUNCTION @schema@.%I(%s) RETURNS %s%s', found.name, array_to_string(found.args, ', '),
                     CASE WHEN found.sets THEN 'SETOF ' ELSE '' END, meant)
        || declared || format(say, format('%s(%s)', found.name, array_to_string(found.args, ', ')))
        || CASE WHEN found.adds_up THEN 'RAISE EXCEPTION ''not a function'';' ELSE
        CASE WHEN found.sets THEN 'RETURN QUERY SELECT ' ELSE 'RETURN ' END
        || format('%I(%s);', found.name,
                  (SELECT string_agg('$' || n, ', ') FROM generate_series(1, cardinality(found.args)) AS n)) END
        || ' END $stranger$';
    EXCEPTION WHEN OTHERS THEN
      CONTINUE;
    END;
  END LOOP;
  FOR found IN
    SELECT DISTINCT p.proname AS name, t.type FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e'
                                     JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'vector',
           unnest(@of_vectors@) AS t (type)
    WHERE d.classid = 'pg_proc'::regclass AND p.pronargs = 1 AND p.proname = ANY (@calls@)
      AND p.pronamespace = '@schema@'::regnamespace
  LOOP
    EXECUTE format('CREATE FUNCTION @schema@.%I(%s) RETURNS text', found.name, found.type)
      || declared || format(say, format('%s(%s)', found.name, found.type)) || ' END $stranger$';
  END LOOP;
END
$strangers$
"""


def calls() -> list[str]:
    """The names of all functions that stand in this package, those of Python too."""
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.sql")]
    return sorted({name for path in files for name in CALL.findall(path.read_text())})


def surround(database: Database, schema: str = "public") -> None:
    names = {"types": TYPES, "seconds": SECOND, "operators": OPERATORS, "calls": calls()}
    names["of_vectors"] = OF_VECTORS
    text = CREATE.replace("@schema@", schema)
    for name, values in names.items():
        text = text.replace(f"@{name}@", "ARRAY[" + ", ".join(f"$q${value}$q$" for value in values) + "]")
    database.run(text)


@contextmanager
def heard(database: Database) -> Iterator[list[str]]:
    """Gives what strangers' functions and operators are called meanwhile, each once, with the statement; filled at the
    end."""
    found: list[str] = []
    (log,) = database.rows("SELECT current_setting('data_directory') || '/server.log'")[0]
    with open(log, errors="replace") as lines:
        lines.seek(0, 2)
        yield found
        text = lines.read()
    found += sorted(set(re.findall(r"LOG:  a stranger's (.*(?:\n.*(?:CONTEXT|STATEMENT): .*(?:\n\t.*)*)*)", text)))
