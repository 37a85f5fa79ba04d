"""Models: checkpoint configuration, weights and the one decoder that serves every supported architecture."""
