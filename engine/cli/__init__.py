"""Hold what the commands share: parsers, options, one-line errors, signals, the log, progress and metrics."""
