"""GIF by giflib, which gets only the first frame."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np

from engine.core.records import Header
from engine.formats.gif import GifLayout
from engine.preprocess.codecs import imagecodecs_call
from engine.preprocess.codecs.gray import Gray, palette_gray

_INTERLACED = 0x40


def decode(data: bytes, header: Header) -> Gray:
    layout: GifLayout = header.layout
    head = struct.pack(
        "<6sHH3xBHHHHB",
        b"GIF89a",
        layout.width,
        layout.height,
        ord(","),
        0,
        0,
        layout.width,
        layout.height,
        _INTERLACED if layout.interlaced else 0,
    )
    frame = head + data[slice(*layout.pixels)] + b";"
    indexes = imagecodecs_call.call_codec(imagecodecs.gif_decode, frame, index=0, asrgb=False)
    if indexes.shape != (layout.height, layout.width):
        raise ValueError("the image is damaged")
    colours = np.frombuffer(data[slice(*layout.palette)], np.uint8).reshape(-1, 3)
    gray = palette_gray(indexes, colours, transparent=layout.transparent)
    if gray.shape == (header.height, header.width):
        return gray
    screen = np.zeros((header.height, header.width), np.uint8)
    screen[layout.top : layout.top + layout.height, layout.left : layout.left + layout.width] = gray
    return screen
