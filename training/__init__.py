"""Labelled radiographs in, a bundle out: `python -m training DATA -o BUNDLE`."""
