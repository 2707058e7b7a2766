"""Show which image regions moved a row's score."""
