"""Prepare, record, resume and finish a run and its folder."""
