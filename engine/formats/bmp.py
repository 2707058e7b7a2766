"""BMP: the Windows headers of 40 to 124 bytes and OS/2's of 12; uncompressed rasters."""

from __future__ import annotations

import struct
from typing import NamedTuple

from engine.core.records import Header
from engine.formats.common import SizeLimit, corrupt, truncated, unsupported

_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_BITS = (1, 4, 8, 24, 32)
_COMPRESSIONS = {1: "RLE8", 2: "RLE4", 4: "JPEG", 5: "PNG"}
_BGR = (0xFF0000, 0xFF00, 0xFF)  # bit masks of red, green and blue in a 32-bit pixel


class BmpLayout(NamedTuple):
    bits: int  # per pixel: 1, 4 or 8 (palette), 24 (BGR), 32 (BGR and alpha or padding)
    start: int  # byte of the first stored row
    stride: int  # bytes from row to row
    top_down: bool
    palette: tuple[int, int, int]  # first byte, entries, bytes of an entry (blue, green, red)
    alpha: bool


def matches(data: bytes) -> bool:
    return data.startswith(b"BM")


def parse(data: bytes, limit: SizeLimit) -> Header:
    start, header_size = struct.unpack_from("<II", data, 10)
    if header_size not in _HEADERS:
        raise corrupt(f"the file has an unknown BMP header of {header_size} bytes")
    compression, colours, entry = 0, 0, 4
    if header_size == 12:
        width, height, planes, bits = struct.unpack_from("<HHHH", data, 18)
        entry = 3
    else:
        width, height, planes, bits, compression, colours = struct.unpack_from("<iiHHI12xI", data, 18)
    limit.check("BMP", width, abs(height))
    if planes != 1 or bits not in (0, 1, 2, 4, 8, 16, 24, 32):
        raise corrupt(f"the BMP header declares {bits} bits and {planes} planes")
    alpha = False
    if compression in (3, 6) and bits == 32:
        masks = struct.unpack_from("<III", data, 54)
        if masks != _BGR:
            raise unsupported("BMP with these colour masks", "8 bits each of blue, green and red")
        alpha = header_size >= 56 and struct.unpack_from("<I", data, 66)[0] == 0xFF000000
    elif compression != 0:
        raise unsupported(f"BMP compression {_COMPRESSIONS.get(compression, compression)}", "none")
    if bits not in _BITS:
        raise unsupported(f"BMP of {bits} bits", "1, 4, 8, 24, 32")
    stride = (width * bits + 31) // 32 * 4
    end = start + stride * abs(height)
    if end > len(data):
        raise truncated(f"the BMP file ends at byte {len(data)} of {end}")
    palette = (14 + header_size, min(colours or 1 << bits, 1 << bits) if bits <= 8 else 0, entry)
    if start < palette[0] + palette[1] * entry:
        raise corrupt(f"the BMP pixels start at byte {start}, inside the header")
    return Header(
        "bmp", width, abs(height), (), 1, BmpLayout(bits, start, stride, height < 0, palette, alpha)
    )
