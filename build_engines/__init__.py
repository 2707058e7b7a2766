"""Compiled plans for the members of a bundle.

No target is built yet: on the CPU the members run from the bundle's own ONNX graphs, which need no compiling.
"""
