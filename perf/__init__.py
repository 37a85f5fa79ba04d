"""Benchmarks: one command a subject, over a common harness (`python -m perf.SUBJECT --help`)."""
