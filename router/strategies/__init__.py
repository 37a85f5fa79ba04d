"""Built-in strategies, one short program a file."""
