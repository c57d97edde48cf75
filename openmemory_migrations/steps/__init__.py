"""Expand, backfill, finalize, and the same for a table whose `v` is a vector already."""
