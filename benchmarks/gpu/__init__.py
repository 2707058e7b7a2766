"""The GPU proof kit: `python -m benchmarks gpu`. On the CPU (`--device cpu`) it runs small, to be tested."""
