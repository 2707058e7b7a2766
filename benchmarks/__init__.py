"""Measure the engine and its limits; each figure is stored with machine, versions and work."""
