"""What the host maps: a table of its own, and OpenMemory's without the vectors."""

import sqlalchemy as sa

metadata = sa.MetaData()

vectors = sa.Table(
    "openmemory_vectors",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("sector", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text),
    sa.Column("v", sa.LargeBinary),
    sa.Column("dim", sa.Integer, nullable=False),
    sa.Index("openmemory_vectors_user_idx", "user_id"),
)
notes = sa.Table(
    "notes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
)
