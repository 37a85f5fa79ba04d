"""KV pages: the pool, page states, the prefix tree and the cache that joins them."""
