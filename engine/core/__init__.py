"""Hold what every layer uses: border records, settings, errors, overlap, hardware, redaction."""
