"""Hold the common parts of all commands: parsers, options, one-line errors, signals and the log."""
