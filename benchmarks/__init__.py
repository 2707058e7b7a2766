"""The engine beside its ceilings; each figure with the machine, the versions and the work it belongs to."""
