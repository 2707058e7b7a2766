"""Decode each image format to 8-bit gray with one strict library, one module per format."""
