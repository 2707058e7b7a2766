"""Show a run's progress on the terminal, as JSON lines and as Prometheus metrics."""
