"""Wire the stages together, overlap them and stop them."""
