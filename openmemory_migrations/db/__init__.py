"""One PostgreSQL connection: URL, drivers, locks, snapshots, catalogs, signals, Citus."""
