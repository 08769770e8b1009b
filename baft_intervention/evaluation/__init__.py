"""Benchmarks: queries, scoring, metrics, protocols, methods, and the runner that ties them together."""
