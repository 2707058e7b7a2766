"""Find copies, leaks and shortcuts in labelled images before training."""
