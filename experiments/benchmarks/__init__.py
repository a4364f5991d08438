"""Generates and reads tasks: benchmarks of the field, task files, and the metrics that score answers."""
