"""Stored bytes and vectors: lengths, COPY forms, SQL forms, the sync trigger."""
