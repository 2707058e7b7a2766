"""Screens archives of bone radiographs: a manifest in, one row of class probabilities per image out."""

__version__ = "0.1.0"
