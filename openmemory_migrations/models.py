"""For a host that maps OpenMemory's table: the table as OpenMemory and these steps leave it, vectors included.

    from openmemory_migrations import autogenerate, models

    vectors = models.vectors_table(Base.metadata, dimensions=1536)
    session.execute(sa.select(vectors.c.id).order_by(vectors.c.v_vector.l2_distance(query)).limit(10))

Read `v_vector` and write `v`: the trigger keeps the one equal to the other.
"""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa
from pgvector.sqlalchemy import VECTOR

from .index.choice import INDEX_DIMENSIONS
from .target import Target


def vectors_table(
    metadata: sa.MetaData,
    *,
    schema: str | None = None,
    table: str = "openmemory_vectors",
    dimensions: int | None,
    index: Literal["ivfflat", "hnsw"] | None = None,
    index_metric: Literal["l2", "cosine", "ip"] = "l2",
) -> sa.Table:
    """The table in `metadata`; `schema` as for any Table, `dimensions` as OM_VEC_DIM, None for a column without.

    Without `index` the vectors' index isn't mapped, which is what autogenerate.include_object expects; a host that
    doesn't use it gives OM_INDEX and OM_INDEX_METRIC here. Raises ValueError for one on more than 2,000 dimensions.
    """
    if index and (dimensions or 0) > INDEX_DIMENSIONS:
        raise ValueError(f"an index on more than {INDEX_DIMENSIONS:,} dimensions can't be mapped, it is on a cast")
    target = Target(schema or "", table)
    vectors = sa.Table(
        table,
        metadata,
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("sector", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text),
        sa.Column("v", sa.LargeBinary),
        sa.Column("dim", sa.Integer, nullable=False),
        sa.Column(target.vector, VECTOR(dimensions), comment=target.comment),
        sa.Index("openmemory_vectors_user_idx", "user_id"),  # by this name whatever the table's
        schema=schema,
    )
    if index:
        sa.Index(
            target.index,
            vectors.c.v_vector,
            postgresql_using=index,
            postgresql_ops={"v_vector": f"vector_{index_metric}_ops"},
        )
    return vectors


__all__ = ["vectors_table"]
