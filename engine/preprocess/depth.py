"""16-bit and transparent PNG to 8-bit gray, by rules DALI doesn't have; the result joins the DALI graph.

DALI divides 16-bit samples by 257, which leaves a 12-bit radiograph 16 gray levels. Here the *significant*
bits decide:

- samples that are all multiples of 257 are 8-bit samples stretched to 16, and are divided by 257;
- otherwise the smallest of 8, 10, 12, 14, 16 bits that holds the largest sample is the depth, and the
  samples are scaled by 255 / (2^depth - 1), rounded.

sBIT is not needed: a writer that follows the PNG recommendation stretches its samples to the full 16 bits,
one that does not leaves them in the low bits, and the rule above reads both right.
Colour becomes ITU-R BT.601 luma; what is transparent is laid over black.
"""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import numpy.typing as npt

DEPTHS = (8, 10, 12, 14, 16)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_ORIENTATION = 0x0112
_BLOCK = 1 << 20  # pixels


def to_gray_pnm(png: bytes) -> bytes:
    """An encoded PNG of any kind as an upright 8-bit gray PNM. Raises ValueError when it is damaged."""
    try:
        samples = imagecodecs.png_decode(png)
    except imagecodecs.PngError as error:
        raise ValueError(str(error)) from None
    gray = oriented(to_gray(samples), orientation(png))
    height, width = gray.shape
    return b"P5 %d %d 255\n" % (width, height) + gray.tobytes()


def to_gray(samples: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Samples [H, W] or [H, W, 1 | 2 | 3 | 4] (gray, gray + alpha, RGB, RGBA) to gray [H, W]."""
    if samples.ndim == 2:
        samples = samples[:, :, None]
    height, width, channels = samples.shape
    opaque = channels in (1, 3)
    scale = np.float32(255.0 / full_scale(samples if opaque else samples[:, :, :-1]))
    gray = np.empty((height, width), np.uint8)
    rows = max(1, _BLOCK // width)  # block by block, so that floats never cost more than the samples
    for start in range(0, height, rows):
        block = samples[start : start + rows]
        colour = block if opaque else block[:, :, :-1]
        level = (colour @ _LUMA if colour.shape[2] == 3 else colour[:, :, 0]) * scale
        if not opaque:
            level *= block[:, :, -1] / np.float32(np.iinfo(samples.dtype).max)
        gray[start : start + rows] = np.clip(np.rint(level), 0, 255)
    return gray


def full_scale(samples: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> int:
    """The sample value that means white: 255, 1023, 4095, 16383 or 65535."""
    if samples.dtype == np.uint8:
        return 255
    largest = int(samples.max())
    if largest > 255 and not any((row % 257).any() for row in samples):
        return 65535
    return next((1 << bits) - 1 for bits in DEPTHS if largest < 1 << bits)


def orientation(png: bytes) -> int:
    """EXIF orientation 1 to 8 of a PNG's eXIf chunk, 1 where there is none."""
    start = png.find(b"eXIf", 33, png.find(b"IDAT", 33))
    exif = png[start + 4 :] if start >= 0 else b""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, directory + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def oriented(gray: npt.NDArray[np.uint8], value: int) -> npt.NDArray[np.uint8]:
    """[H, W] as it should be seen: EXIF 2.32, tag 0x0112."""
    if value >= 5:
        gray = gray.T
    if value in (2, 3, 6, 7):
        gray = gray[:, ::-1]
    if value in (3, 4, 7, 8):
        gray = gray[::-1]
    return np.ascontiguousarray(gray)
