"""What `make demo` runs, and what it shares with the tests."""
