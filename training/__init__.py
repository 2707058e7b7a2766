"""Train a bundle from labelled radiographs: `python -m training DATA -o BUNDLE`."""

import os

# Set before torch is imported. By default its threads spin while they wait, which makes small operations
# forty times slower on two cores with another busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
