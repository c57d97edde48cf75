"""Commands of the console script that work on a database."""
