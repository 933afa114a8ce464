"""What one GPU says of this project: ``python -m benchmarks.device``, see `__main__`."""
