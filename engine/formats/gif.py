"""GIF 87a and 89a, the first frame."""

from __future__ import annotations

import struct
from typing import NamedTuple

from engine.core.records import Header
from engine.formats.common import SizeLimit, corrupt, truncated

MAX_BLOCKS = 1_000_000
_EXTENSION, _IMAGE, _TRAILER, _CONTROL = 0x21, 0x2C, 0x3B, 0xF9


class GifLayout(NamedTuple):
    left: int  # of the frame on the screen
    top: int
    width: int
    height: int
    interlaced: bool
    palette: tuple[int, int]  # first byte and end; entries of red, green, blue
    transparent: int  # index, -1 for none
    pixels: tuple[int, int]  # first byte and end: LZW code size and data blocks


def matches(data: bytes) -> bool:
    return data.startswith((b"GIF87a", b"GIF89a"))


def parse(data: bytes, limit: SizeLimit) -> Header:
    width, height, packed = struct.unpack_from("<HHB", data, 6)
    limit.check("GIF", width, height)
    position = 13 + _palette_bytes(packed)
    palette, layout, transparent = (13, position), None, -1
    blocks = 0
    while True:
        (kind,) = struct.unpack_from("B", data, position)
        if kind == _TRAILER or (kind == _IMAGE and layout is not None):
            break
        if kind == _EXTENSION:
            if layout is None and data[position + 1 : position + 3] == bytes((_CONTROL, 4)):
                flags, transparent = struct.unpack_from("BxxB", data, position + 3)
                transparent = transparent if flags & 1 else -1
            start = position + 2
        elif kind == _IMAGE:
            left, top, frame_width, frame_height, packed = struct.unpack_from("<HHHHB", data, position + 1)
            if not (0 < frame_width <= width - left and 0 < frame_height <= height - top):
                raise corrupt(
                    f"the GIF frame of {frame_width} x {frame_height} pixels extends outside of its screen"
                )
            start = position + 10 + _palette_bytes(packed)
            palette = (position + 10, start) if packed & 0x80 else palette
        else:
            raise corrupt(f"the GIF file has an unknown block of kind {kind} at byte {position}")
        position, blocks = _blocks_end(data, start + (kind == _IMAGE), blocks)
        if kind == _IMAGE:
            layout = GifLayout(
                left,
                top,
                frame_width,
                frame_height,
                bool(packed & 0x40),
                palette,
                transparent,
                (start, position),
            )
    if layout is None:
        raise corrupt("the GIF file has no image")
    if layout.palette[0] == layout.palette[1]:
        raise corrupt("the GIF file has no palette")
    return Header("gif", width, height, ("first_frame",) if kind == _IMAGE else (), 1, layout)


def _palette_bytes(packed: int) -> int:
    return 3 << (packed & 7) + 1 if packed & 0x80 else 0


def _blocks_end(data: bytes, position: int, blocks: int) -> tuple[int, int]:
    """Return the byte after the data blocks that start at `position`, and the count of blocks so far."""
    while blocks < MAX_BLOCKS:
        if position >= len(data):
            raise truncated(f"the GIF file ends at byte {len(data)} inside its blocks")
        length = data[position]
        position += 1 + length
        blocks += 1
        if length == 0:
            return position, blocks
    raise corrupt(f"the GIF file has more than {MAX_BLOCKS} blocks")
