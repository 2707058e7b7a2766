"""What tests of several modules use: images, bundles, servers, processes."""
