"""What models are asked: benchmarks of the field, task files, and the metrics that score answers."""
