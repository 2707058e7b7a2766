"""BMP: an uncompressed raster, read without a library (imagecodecs reads only 8 and 24 bits)."""

from __future__ import annotations

import numpy as np

from engine.core.records import Header
from engine.formats.bmp import BmpLayout
from engine.preprocess.codecs.gray import Gray, palette_gray, to_gray, unpack_bits


def decode(data: bytes, header: Header) -> Gray:
    layout: BmpLayout = header.layout
    size = layout.stride * header.height
    rows = np.frombuffer(data, np.uint8, size, layout.start).reshape(header.height, layout.stride)
    rows = rows if layout.top_down else rows[::-1]
    if layout.bits >= 24:
        channels = layout.bits // 8
        pixels = rows[:, : header.width * channels].reshape(header.height, header.width, channels)
        return to_gray(pixels[:, :, [2, 1, 0, 3] if layout.alpha else [2, 1, 0]])
    if layout.bits < 8:
        rows = unpack_bits(rows, layout.bits)
    first, entries, entry = layout.palette
    colours = np.frombuffer(data, np.uint8, entries * entry, first).reshape(entries, entry)
    return palette_gray(rows[:, : header.width], colours[:, 2::-1])
