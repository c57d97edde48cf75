"""Rows converted in batches: read, written, claimed, paced, shown."""
