"""Search for the fastest options on this machine and store them beside the bundle."""
