"""Encoded bytes to uint8 gray [N, 1, H, W]: decoded and resized, in a process of its own."""
