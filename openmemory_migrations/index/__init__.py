"""The vector index: planned, built, replaced."""
