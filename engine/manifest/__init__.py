"""Read a manifest, folder or archive as rows in order, cut into parts."""
