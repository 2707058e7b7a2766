"""Samples of any depth to 8-bit gray.

DALI divides 16-bit samples by 257, which leaves a 12-bit radiograph 16 gray levels. Here the scale depends on
the *significant* bits:

- samples that are all multiples of 257 are 8-bit samples stretched to 16, and are divided by 257;
- otherwise the smallest of 8, 10, 12, 14, 16 bits that holds the largest sample is the depth, and the
  samples are scaled by 255 / (2^depth - 1), rounded.

If a file declares fewer than 16 bits, another white, or PNG's sBIT, the declaration is used. Colour becomes
ITU-R BT.601 luma; transparent pixels are blended with black.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DEPTHS = (8, 10, 12, 14, 16)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BLOCK = 1 << 20  # pixels
_LUT_BLOCK = 1 << 16  # pixels that are looked up together and fit into the cache

Gray = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
# pixels, or fractions of one, at (top, bottom) and (left, right) that are outside of the picture
Margins = tuple[tuple[float, float], tuple[float, float]]


def to_gray(samples: Samples, *, white: int | None = None) -> Gray:
    """Convert samples [H, W] or [H, W, 1 | 2 | 3 | 4] (gray, gray + alpha, RGB, RGBA) to gray [H, W].

    `white` is the sample value of white and of opaque alpha where the format defines it; otherwise opaque is
    the largest value of the type.
    """
    if samples.ndim == 2:
        samples = samples[:, :, None]
    height, width, channels = samples.shape
    opaque = channels in (1, 3)
    if white is None:
        white = white_of(samples if opaque else samples[:, :, :-1])
        opaque_alpha = int(np.iinfo(samples.dtype).max)
    else:
        opaque_alpha = white
    if channels == 1 and samples.dtype == np.uint8 and white == 255:
        return np.ascontiguousarray(samples[:, :, 0], np.uint8)
    if channels == 1:
        levels = np.arange(1 + int(np.iinfo(samples.dtype).max), dtype=np.float32) * np.float32(255.0 / white)
        return apply_lut(samples[:, :, 0], np.clip(np.rint(levels), 0, 255).astype(np.uint8))
    gray = np.empty((height, width), np.uint8)
    rows = max(1, _BLOCK // width)  # in blocks: the floats take less memory than the samples
    for start in range(0, height, rows):
        block = samples[start : start + rows]
        colour = block if opaque else block[:, :, :-1]
        level = colour @ _LUMA if colour.shape[2] == 3 else colour[:, :, 0].astype(np.float32)
        level = level * np.float32(255.0 / white)
        if not opaque:
            level *= block[:, :, -1] / np.float32(opaque_alpha)
        gray[start : start + rows] = np.clip(np.rint(level), 0, 255)
    return gray


def white_of(samples: Samples) -> int:
    """Return the sample value that means white: 255, 1023, 4095, 16383 or 65535."""
    if samples.dtype == np.uint8:
        return 255
    largest = int(samples.max())
    if largest > 255 and not any((row % 257).any() for row in samples):
        return 65535
    return next((1 << bits) - 1 for bits in DEPTHS if largest < 1 << bits)


def declared_white(bits: int) -> int | None:
    """Return the white value for samples of `bits` bits; for 16, the significant bits decide."""
    return (1 << bits) - 1 if bits < 16 else None


def palette_gray(indexes: npt.NDArray[np.uint8], colours: Samples, *, transparent: int = -1) -> Gray:
    """Convert indexes [H, W] into uint8 colours [n, 3] to gray; transparent and unknown ones are black."""
    table = np.zeros(256, np.uint8)
    table[: len(colours)] = to_gray(colours[None], white=255)[0]
    if transparent >= 0:
        table[transparent] = 0
    return apply_lut(indexes, table)


def apply_lut(samples: Samples, levels: Gray) -> Gray:
    """Replace samples [H, W] by `levels`, one for each value of their type."""
    gray = np.empty(samples.shape, np.uint8)
    rows = max(1, _LUT_BLOCK // samples.shape[1])
    for start in range(0, len(samples), rows):
        block = slice(start, start + rows)
        np.take(levels, samples[block], out=gray[block], mode="clip")
    return gray


def unpack_bits(rows: Gray, bits: int) -> Gray:
    """Unpack rows [n, stride] of samples of 1, 2 or 4 bits, the highest first, to one byte each."""
    samples = [rows >> shift & (1 << bits) - 1 for shift in range(8 - bits, -1, -bits)]
    return np.stack(samples, axis=2).reshape(len(rows), -1)


def apply_orientation(gray: Gray, value: int) -> Gray:
    """Turn and mirror [H, W] upright: EXIF 2.32, tag 0x0112."""
    if value >= 5:
        gray = gray.T
    if value in (2, 3, 6, 7):
        gray = gray[:, ::-1]
    if value in (3, 4, 7, 8):
        gray = gray[::-1]
    return np.ascontiguousarray(gray)


def orient_margins(bottom: float, right: float, value: int) -> Margins:
    """Return the margins of an image after `apply_orientation`, from those of the stored image."""
    rows, columns = (0.0, bottom), (0.0, right)
    if value >= 5:
        rows, columns = columns, rows
    if value in (2, 3, 6, 7):
        columns = columns[::-1]
    if value in (3, 4, 7, 8):
        rows = rows[::-1]
    return rows, columns
