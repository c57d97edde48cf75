-- of encoding/back_trigger.py

-- create_unconvert --
-- vector_send() gives int16 dimensions, int16 zero, then float4 big-endian (pgvector, src/vector.c). Half the time of
-- turning the bytes of its hexadecimal text round with a regular expression (measured, 1,536 dimensions: 0.37 ms)
CREATE OR REPLACE FUNCTION {unconvert}(source {ext}.vector) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS {tag}
DECLARE
  sent CONSTANT bytea := {ext}.vector_send(source);
BEGIN
  RETURN (SELECT string_agg(substr(sent, i + 3, 1) || substr(sent, i + 2, 1) || substr(sent, i + 1, 1)
                            || substr(sent, i, 1), ''::bytea ORDER BY i)
          FROM generate_series(5, octet_length(sent), 4) AS i);
END
{tag}

-- create_forgetting --
CREATE OR REPLACE FUNCTION {back_function}() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  NEW.{source} := NULL;
  RETURN NEW;
END
{tag}

-- forgetting --
CREATE TRIGGER {back} BEFORE UPDATE OF {vector} ON {table}
FOR EACH ROW WHEN (OLD.{source} IS NOT NULL) EXECUTE FUNCTION {back_function}()

-- create_following --
-- SECURITY DEFINER: the writer may lack rights on the extension's schema
CREATE OR REPLACE FUNCTION {back_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  NEW.{source} := {unconvert}(NEW.{vector});
  RETURN NEW;
END
{tag}

-- following --
CREATE TRIGGER {back} BEFORE INSERT OR UPDATE OF {vector} ON {table}
FOR EACH ROW EXECUTE FUNCTION {back_function}()

-- of encoding/dimensions.py

-- sourceless --
SELECT {ext}.vector_dims({which}), count(*) FROM {table}
WHERE {source} IS NULL AND {which} IS NOT NULL GROUP BY 1

-- of encoding/native.py

-- try_native --
-- whether these become what they have to be, to the bit, and others nothing
SELECT pg_catalog.encode({ext}.vector_send({value}), 'hex')
         = {header|literal} || pg_catalog.substr(pg_catalog.repeat({words_sent|literal}, {times}), 1, 2 * {octets})
       AND NOT {unfit}
       AND NOT EXISTS (SELECT FROM unnest(ARRAY[0, 4, {octets} - 1, {octets} - 4]) AS short,
                                   LATERAL (SELECT pg_catalog.substr(t.tried, 1, short) AS tried) AS s
                       WHERE {value_of_short} IS NOT NULL OR NOT {unfit_short})
       AND NOT EXISTS (SELECT FROM unnest(ARRAY[{bad}]) AS bad,
                                   LATERAL (SELECT pg_catalog.decode(bad, 'hex') || pg_catalog.substr(t.tried, 5)
                                                   AS tried) AS b
                       WHERE NOT {unfit_bad})
FROM (SELECT pg_catalog.decode(pg_catalog.substr(pg_catalog.repeat({words|literal}, {times}), 1, 2 * {octets}), 'hex')
             AS tried) AS t

-- of encoding/sync_trigger.py

-- create_convert --
-- float32 from its bytes: sign, exponent and 23 bits, in float8, where every float32 is exact (denormals and -0 too).
-- NULL for whatever can't become a vector, so that it never fails a write. PL/pgSQL because it is 2.6 times as fast here
-- as the same query in LANGUAGE sql (measured, 256 dimensions); `|| ''` fetches a value out of line once, not per byte.
CREATE OR REPLACE FUNCTION {convert}(source bytea, dimensions integer) RETURNS {ext}.vector
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS {tag}
DECLARE
  wanted CONSTANT integer := coalesce(dimensions, octet_length(source) / 4);
  bytes bytea;
  elements float8[];
BEGIN
  IF source IS NULL OR octet_length(source) <> 4 * wanted OR wanted NOT BETWEEN 1 AND 16000 THEN
    RETURN NULL;
  END IF;
  bytes := source || ''::bytea;
  elements := ARRAY(
    SELECT CASE high & 32640
             WHEN 32640 THEN NULL
             WHEN 0 THEN (((high & 127) << 16) + low)
                         * CASE WHEN high > 32767 THEN -(2::float8 ^ -149) ELSE 2::float8 ^ -149 END
             ELSE (((high & 127) << 16) + low + 8388608)
                  * CASE WHEN high > 32767 THEN -(2::float8 ^ (((high >> 7) & 255) - 150))
                         ELSE 2::float8 ^ ((high >> 7) - 150) END
           END
    FROM (SELECT get_byte(bytes, i) + (get_byte(bytes, i + 1) << 8) AS low,
                 get_byte(bytes, i + 2) + (get_byte(bytes, i + 3) << 8) AS high
          FROM generate_series(0, 4 * wanted - 4, 4) AS i OFFSET 0) AS halves);
  IF array_position(elements, NULL) IS NOT NULL THEN
    RETURN NULL;
  END IF;
  RETURN elements::{ext}.vector;
END
{tag}

-- create_sync --
-- the writer may lack rights on the extension's schema, hence SECURITY DEFINER; no EXCEPTION block: it would cost every
-- write a subtransaction. A vector that the writer has set itself stays.
CREATE OR REPLACE FUNCTION {sync_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  IF NEW.{vector} IS NULL
     OR (TG_OP = 'UPDATE' AND {ext}.vector_send(NEW.{vector}) IS NOT DISTINCT FROM {ext}.vector_send(OLD.{vector})) THEN
    NEW.{vector} := {convert}(NEW.{source}, {dimensions});
  END IF;
  RETURN NEW;
END
{tag}

-- create_sync_trigger --
CREATE OR REPLACE TRIGGER {sync} BEFORE INSERT OR UPDATE OF {source} ON {table}
FOR EACH ROW EXECUTE FUNCTION {sync_function}()

-- native_value --
-- by CASE: the conditions of an AND are evaluated in the order of their costs. What is measured is what is converted,
-- also where the column has become one of another type while we waited for it, or somebody has types of these names
CASE WHEN {length} = {octets}
     THEN pg_temp.openmemory_migrations_join(pg_catalog.decode('{header}', 'hex'),
                                             CAST({source} AS pg_catalog.bytea)) END
