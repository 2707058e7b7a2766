"""Encoded bytes to uint8 gray [N, 1, H, W]: the one DALI graph, in a process of its own."""
