-- of encoding/back_trigger.py

-- bytes_of --
-- the bytes that a vector came from. array_send() gives 20 bytes of header, then of each number four that say its length
-- and float4, big-endian (src/backend/utils/adt/arrayfuncs.c). No name of the extension's is in it, whose schema may get
-- another; and no function that other tables need as well
(SELECT string_agg(substr(sent, i + 3, 1) || substr(sent, i + 2, 1) || substr(sent, i + 1, 1) || substr(sent, i, 1),
                   ''::bytea ORDER BY i)
   FROM (SELECT array_send({it}::real[]) OFFSET 0) AS s (sent), generate_series(25, octet_length(sent), 8) AS i)

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
-- SECURITY DEFINER: the writer may lack rights on what the extension has
CREATE OR REPLACE FUNCTION {back_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  NEW.{source} := {bytes};
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

-- elements --
-- float32 from its bytes: sign, exponent and 23 bits, in float8, where every float32 is exact (denormals and -0 too), and
-- NULL for what no vector can hold. `|| ''` fetches a value out of line once, not per byte
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
          FROM generate_series(0, octet_length(bytes) - 4, 4) AS i OFFSET 0) AS halves);

-- create_convert --
-- for the time of a run. PL/pgSQL because it is 2.6 times as fast here as the same query in LANGUAGE sql (measured, 256
-- dimensions)
CREATE OR REPLACE FUNCTION {convert}(source bytea, dimensions integer) RETURNS {ext}.vector
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS {tag}
DECLARE
  bytes bytea;
  elements float8[];
BEGIN
  IF source IS NULL OR octet_length(source) <> 4 * dimensions THEN
    RETURN NULL;
  END IF;
  {>elements}
  RETURN CASE WHEN array_position(elements, NULL) IS NULL THEN elements::{ext}.vector END;
END
{tag}

-- create_sync --
-- It calls nothing that other tables need as well, and names nothing of the extension's, whose schema may get another
-- name: what is assigned to the column becomes a vector by a cast. NULL where there can't be one, so that no write fails;
-- no EXCEPTION block: it would cost every write a subtransaction. A vector that the writer has set itself stays. SECURITY
-- DEFINER: the writer may lack rights on what the extension has
CREATE OR REPLACE FUNCTION {sync_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {tag}
DECLARE
  source CONSTANT bytea := NEW.{source};
  wanted CONSTANT integer := coalesce({dimensions}, octet_length(source) / 4);
  bytes bytea;
  elements float8[];
BEGIN
  IF NEW.{vector} IS NOT NULL
     AND (TG_OP = 'INSERT' OR NOT record_image_eq(ROW(NEW.{vector}), ROW(OLD.{vector}))) THEN
    RETURN NEW;
  END IF;
  NEW.{vector} := NULL;
  IF octet_length(source) = 4 * wanted AND wanted BETWEEN 1 AND 16000 THEN
    {>elements}
    IF array_position(elements, NULL) IS NULL THEN
      NEW.{vector} := elements;
    END IF;
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
