"""Can it be migrated, what will it take, where does it stand."""
