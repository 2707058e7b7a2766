"""Benchmarks for a GPU: `python -m benchmarks gpu`; `--device cpu` is for tests."""
