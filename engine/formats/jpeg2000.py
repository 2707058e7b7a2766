"""JPEG 2000: codestream by ITU-T T.800 annex A, JP2 boxes by annex I.

OpenJPEG allocates in proportion to the numbers of tiles, precincts, code-blocks and quality layers, each of
which a few bytes can make enormous. They are bounded here, in the main header and in the tile-part headers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from engine.core.records import Header
from engine.formats.common import SizeLimit, corrupt, truncated, unsupported

MAX_BOXES = 1_000
MAX_SEGMENTS = 10_000  # of one header
MAX_TILE_PARTS = 100_000
MAX_LAYERS = 256
_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
_START = b"\xff\x4f\xff\x51"
_COD, _COC, _SOT, _SOD = 0xFF52, 0xFF53, 0xFF90, 0xFF93
_CMYK, _YCC = 12, 18  # enumerated colour spaces
_PIXELS_PER_TILE, _PIXELS_PER_PRECINCT, _FREE = 4096, 256, 1024


class Jpeg2000Layout(NamedTuple):
    codestream: tuple[int, int]  # first byte and end
    bits: int  # of a sample
    channels: int  # 1 to 4: gray or colour; the 2nd or 4th is transparency
    luma_first: bool  # the first channel is luma: YCC
    signed: bool


class _Size(NamedTuple):
    width: int
    height: int
    tile: tuple[int, int]
    tiles: int
    channels: int


def matches(data: bytes) -> bool:
    return data.startswith((_SIGNATURE, _START))


def parse(data: bytes, limit: SizeLimit, *, frame: bool = False) -> Header:
    """Parse a JP2 file or a codestream; `frame` of a DICOM file, whose samples may be signed."""
    if data.startswith(_START):
        start, end, colour = 0, len(data), 0
    else:
        start, end, colour = _boxes(data, limit)
    size, layout = _read_siz(data, start, end, colour, limit)
    if layout.signed and not frame:
        raise unsupported("JPEG 2000 with signed samples")
    if end > len(data):
        raise truncated(f"the JPEG 2000 file ends at byte {len(data)} of {end}")
    _check_tile_parts(data, start, end, size)
    return Header("jpeg2000", size.width, size.height, (), 1, layout, layout.bits)


def _boxes(data: bytes, limit: SizeLimit) -> tuple[int, int, int]:
    """Return first byte and end of the codestream, and the enumerated colour space (0 for none)."""
    colour = 0
    for kind, start, end in _children(data, 0, len(data)):
        if kind == b"jp2h":
            if end > len(data):
                raise truncated(f"the JPEG 2000 file ends at byte {len(data)} inside its header")
            colour = _image_header(data, start, end, limit)
        if kind == b"jp2c":
            return start, end, colour
    raise truncated(f"the JPEG 2000 file ends at byte {len(data)} without a codestream")


def _children(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the body of each box; the last box may end after `end`."""
    for _ in range(MAX_BOXES):
        if position >= end:
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        header_bytes = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
            header_bytes = 16
        elif length == 0:
            length = end - position
        if length < header_bytes:
            raise corrupt(f"the JPEG 2000 file has a box of {length} bytes at byte {position}")
        yield kind, position + header_bytes, position + length
        position += length
    raise corrupt(f"the JPEG 2000 file has more than {MAX_BOXES} boxes")


def _image_header(data: bytes, start: int, end: int, limit: SizeLimit) -> int:
    colour = 0
    for kind, position, box_end in _children(data, start, end):
        if box_end > end:
            raise corrupt(f"the JPEG 2000 box at byte {position} is longer than the box that contains it")
        if kind == b"ihdr":
            height, width = struct.unpack_from(">II", data, position)
            limit.check("JPEG 2000", width, height)
        elif kind == b"pclr":
            raise unsupported("JPEG 2000 with a palette")
        elif kind == b"colr" and not colour and data[position : position + 1] == b"\1":
            (colour,) = struct.unpack_from(">I", data, position + 3)
    if colour == _CMYK:
        raise unsupported("JPEG 2000 in CMYK")
    return colour


def _read_siz(
    data: bytes, start: int, end: int, colour: int, limit: SizeLimit
) -> tuple[_Size, Jpeg2000Layout]:
    """Read the codestream's SIZ segment, which holds the size."""
    if data[start : start + 4] != _START:
        if start + 4 > len(data):
            raise truncated(f"the JPEG 2000 file ends at byte {len(data)} without a codestream")
        raise corrupt("the JPEG 2000 codestream has no size segment")
    length, right, bottom, left, top, *tile, channels = struct.unpack_from(">H2x8IH", data, start + 4)
    box_size = limit.size
    limit.check("JPEG 2000", right - left, bottom - top)
    width, height = right - left, bottom - top
    if box_size not in (None, (width, height)):
        raise corrupt(
            f"the JPEG 2000 codestream has {width} x {height} pixels, its box {box_size[0]} x {box_size[1]}"
        )
    tile_width, tile_height, tile_left, tile_top = tile
    if not (tile_left <= left < tile_left + tile_width and tile_top <= top < tile_top + tile_height):
        raise corrupt(
            f"the JPEG 2000 tiles of {tile_width} x {tile_height} pixels do not start at the image's origin"
        )
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > min(65_535, _FREE + width * height // _PIXELS_PER_TILE):
        raise corrupt(f"the JPEG 2000 header declares {tiles} tiles for {width} x {height} pixels")
    if length != 38 + 3 * channels or channels == 0:
        raise corrupt(f"the JPEG 2000 header declares {channels} channels in a segment of {length} bytes")
    if channels > 4:
        raise unsupported(f"JPEG 2000 with {channels} channels", "1 to 4")
    components = struct.unpack_from(f">{3 * channels}B", data, start + 42)
    depth = components[0]
    if depth & 0x7F > 15 or components != (depth, 1, 1) * channels:
        raise unsupported("JPEG 2000 with subsampled channels, mixed depths or over 16 bits")
    size = _Size(width, height, (min(tile_width, width), min(tile_height, height)), tiles, channels)
    return size, Jpeg2000Layout(
        (start, end), (depth & 0x7F) + 1, channels, colour == _YCC and channels >= 3, depth > 0x7F
    )


def _check_tile_parts(data: bytes, start: int, end: int, size: _Size) -> None:
    """Check the main header and every tile part. Raises HeaderError where a part is missing."""
    layers, position = _segments(data, start + 2, end, _SOT, size, 1)
    parts: dict[int, list[int]] = {}  # tile -> parts seen, parts declared
    for _ in range(MAX_TILE_PARTS):
        if position + 2 > end or data[position : position + 2] == b"\xff\xd9":
            break
        marker, _, tile, length, _, declared = struct.unpack_from(">HHHIBB", data, position)
        if marker != _SOT or tile >= size.tiles or (length < 14 and length != 0):
            raise corrupt(f"the JPEG 2000 codestream has no valid tile part at byte {position}")
        if position + length > end:
            raise truncated(f"the JPEG 2000 codestream ends at byte {end} inside tile {tile}")
        following = position + length if length else end
        _segments(data, position + 12, following, _SOD, size, layers)
        counts = parts.setdefault(tile, [0, 0])
        counts[0] += 1
        counts[1] = max(counts[1], declared)
        position = following
    else:
        raise corrupt(f"the JPEG 2000 codestream has more than {MAX_TILE_PARTS} tile parts")
    if len(parts) < size.tiles or any(seen < declared for seen, declared in parts.values()):
        raise truncated(f"the JPEG 2000 codestream ends at byte {end} without all of its {size.tiles} tiles")


def _segments(data: bytes, position: int, end: int, last: int, size: _Size, layers: int) -> tuple[int, int]:
    """Check the segments up to marker `last`; return the most quality layers and the marker's byte."""
    for _ in range(MAX_SEGMENTS):
        (marker,) = struct.unpack_from(">H", data, position)
        if marker == last:
            return layers, position
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker < 0xFF00 or length < 2:
            raise corrupt(f"the JPEG 2000 codestream has no marker at byte {position}, where one is expected")
        if position + 2 + length > end:
            raise truncated(f"the JPEG 2000 codestream ends at byte {end} inside a header")
        body = data[position + 4 : position + 2 + length]
        if marker == _COD:
            scheme, _, declared, _ = struct.unpack_from(">BBHB", body)
            layers = max(layers, declared)
            _check_style(body[5:], bool(scheme & 1), size, layers)
        elif marker == _COC:
            _check_style(body[2:], bool(body[1:2] and body[1] & 1), size, layers)
        position += 2 + length
    raise corrupt(f"the JPEG 2000 header has more than {MAX_SEGMENTS} segments")


def _check_style(style: bytes, own_precincts: bool, size: _Size, layers: int) -> None:
    """Bound the decoder's memory for one tile: T.800 tables A.15 and A.20."""
    levels, block_width, block_height, _, _ = struct.unpack_from(">5B", style)
    exponents = style[5 : 6 + levels] if own_precincts else b"\xff" * (levels + 1)
    if levels > 32 or len(exponents) != levels + 1 or layers == 0:
        raise corrupt(f"the JPEG 2000 header declares {levels} resolution levels and {layers} quality layers")
    if block_width + block_height < 4:
        raise unsupported(f"JPEG 2000 with code-blocks of {4 << block_width} x {4 << block_height} samples")
    precincts = []
    for resolution, exponent in enumerate(exponents):
        shrink = levels - resolution
        across = -(-size.tile[0] // (1 << shrink + (exponent & 15)))
        down = -(-size.tile[1] // (1 << shrink + (exponent >> 4)))
        precincts.append(across * down)
    pixels = size.tile[0] * size.tile[1]
    packets = max(precincts) * len(precincts) * size.channels * layers
    if layers > MAX_LAYERS or sum(precincts) > _FREE + pixels // _PIXELS_PER_PRECINCT:
        raise unsupported(f"JPEG 2000 with {layers} quality layers and {sum(precincts)} precincts in a tile")
    if packets > (1 << 20) + 2 * pixels:
        raise unsupported(f"JPEG 2000 with {packets} packets in a tile")
