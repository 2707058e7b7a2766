"""Compute statistics that know nothing of runs or images."""
