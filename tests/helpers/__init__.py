"""Helpers of several test modules: images, bundles, servers, processes."""
