"""The tolerances of all tests."""

# pixels of the DALI graph against Pillow's full decode and antialiased BILINEAR, gray levels
PIXEL_MEAN = 1.0
PIXEL_MAX = 8
# pixels of the fast decode against the full one, gray levels; noise of single pixels is the worst case
FAST_MEAN = 1.4
FAST_MAX = 64
# probabilities of the engine against a plain float32 PyTorch script
PARITY = 2e-3
# the same numbers by another order of float32 operations
ROUNDING = 1e-6
