"""The chain as SQL, for `--sql`."""
