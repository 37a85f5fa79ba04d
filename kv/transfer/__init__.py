"""Moving KV pages from one engine's pool into another's."""
