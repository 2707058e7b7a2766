"""Labelled radiographs in, a bundle out: `python -m training DATA -o BUNDLE`."""

import os

# Before torch is imported: its threads spin while they wait for each other, and beside one other busy process
# on two cores that makes small operations forty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
