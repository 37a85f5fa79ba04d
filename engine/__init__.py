"""The engine: scheduler, executors, models, and the daemon that serves them over the bus."""
