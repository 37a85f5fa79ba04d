"""The router: text, HTTP, strategies and the view of the fleet."""
