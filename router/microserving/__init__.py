"""The engines' verbs over HTTP: bodies, endpoints, description."""
