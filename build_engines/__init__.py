"""Compile a bundle's members into plans, each with a passport and a parity check."""
