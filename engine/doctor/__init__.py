"""Check the machine, the bundle and a manifest before a run, and forecast its time and disk space."""
