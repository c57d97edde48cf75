-- of verify/equality.py

-- dims --
-- values are read whole for their dimensions; NEXT finds the place of one without
SELECT CAST(max(tid) AS text), count(*), count(dims) FROM (
  SELECT ctid AS tid, {ext}.vector_dims({vector}) AS dims FROM ONLY {table}
  WHERE ctid > '({page},{item})' AND ctid < '({end},0)' AND {vector} IS NOT NULL LIMIT {rows}) AS next

-- next --
SELECT CAST(ctid AS text) FROM ONLY {table}
WHERE ctid > '({page},{item})' AND ctid < '({end},0)' AND {vector} IS NOT NULL LIMIT {rows}

-- of verify/queries.py

-- sizes --
SELECT CAST({group} AS text), count(*) FROM {table} WHERE {eligible} AND {group} IS NOT NULL
GROUP BY 1 HAVING count(*) > {least} ORDER BY {order} LIMIT {most}

-- chosen --
-- by place and not by key, so that a table without one can be asked; values are fetched for the chosen rows only. Of a
-- large group only the hashes below a bound are sorted: a few times as many as are wanted
WITH om_chosen AS (
  SELECT tableoid AS om_part, ctid AS om_place, {hash} AS om_hash,
         row_number() OVER (PARTITION BY {group} ORDER BY {hash}) AS om_number
  FROM {table} WHERE {eligible} AND {hash} <= {bound})
SELECT {value}, {sector_number}, {user_number}
FROM om_chosen JOIN {table} AS t ON t.ctid = om_place AND t.tableoid = om_part
WHERE om_number <= :each ORDER BY om_number, om_hash

-- of verify/tuning.py

-- create --
CREATE TEMPORARY TABLE {copy} AS
SELECT {columns} FROM {table} TABLESAMPLE BERNOULLI ({percent}) REPEATABLE (0)
WHERE {with_values} LIMIT {rows}

-- of verify/verification.py

-- same --
SELECT coalesce(bool_and(CAST(to_regclass(t.name) AS oid) IS NOT DISTINCT FROM t.oid), true)
FROM unnest(CAST(:names AS text[]), CAST(:oids AS oid[])) AS t (name, oid)

-- lists_of_leaves --
SELECT max(CAST(substr(option, 7) AS integer))
FROM pg_catalog.pg_partition_tree(CAST(:index AS regclass)) AS t JOIN pg_catalog.pg_class c ON c.oid = t.relid,
     unnest(c.reloptions) AS option
WHERE t.isleaf AND option LIKE 'lists=%'

-- others --
-- what the pass over both columns leaves out: the vector is missing, or of other dimensions than the bytes
SELECT {length}, {vector} IS NULL, count(*) FROM ONLY {table}
WHERE {inside} AND ({of_size} AND {vector} IS NOT NULL) IS NOT TRUE GROUP BY 1, 2
