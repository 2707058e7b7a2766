"""Read the files of a manifest ahead, within a budget of bytes, and give each failed read a status."""
