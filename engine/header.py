"""What an encoded image says of itself: format, size and depth, read from its first bytes, nothing decoded.

A JPEG's structure is ITU-T T.81 annex B, a PNG's is the W3C recommendation of 2003.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from engine.records import Status

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PNG_CHUNKS = 200_000
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_DECODABLE_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive; all Huffman-coded
_NAMED = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "ZIP"),
)


class Header(NamedTuple):
    """`deep`: 16 bits or transparency, which go through `engine.preprocess.depth` before the graph."""

    format: str
    width: int
    height: int
    deep: bool = False
    flags: tuple[str, ...] = ()


class HeaderError(Exception):
    """The bytes can't be scored; `status` says why in the ledger's words."""

    def __init__(self, status: Status, message: str, size: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.status, self.size = status, size


def parse(data: bytes, max_pixels: int) -> Header:
    found = _parse(data)
    if found.width * found.height > max_pixels:
        raise HeaderError(
            Status.TOO_LARGE,
            f"{found.width} x {found.height} pixels; --max-pixels allows {max_pixels}",
            (found.width, found.height),
        )
    return found


def _parse(data: bytes) -> Header:
    """The header of a JPEG or PNG file, decided by content.

    Raises HeaderError with UNSUPPORTED, TRUNCATED (the end is missing) or CORRUPT.
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(PNG_SIGNATURE):
        return _png(data)
    raise HeaderError(Status.UNSUPPORTED, f"{_name(data)}; supported: JPEG, PNG")


def _name(data: bytes) -> str:
    if data[128:132] == b"DICM":
        return "a DICOM file"
    for magic, name in _NAMED:
        if data.startswith(magic):
            return f"a {name} file"
    return f"not an image (starts with {data[:8].hex()})"


def _jpeg(data: bytes) -> Header:
    position, size = 2, len(data)
    while position + 4 <= size:
        if data[position] != 0xFF:
            raise HeaderError(Status.CORRUPT, f"JPEG marker expected at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        length = data[position + 2] << 8 | data[position + 3]
        if marker in _FRAMES:
            return _jpeg_frame(data, marker, position)
        if marker in (0xD9, 0xDA) or length < 2:
            raise HeaderError(Status.CORRUPT, "JPEG without a frame header")
        position += 2 + length
    raise HeaderError(Status.TRUNCATED, f"JPEG ends inside its header at byte {size}")


def _jpeg_frame(data: bytes, marker: int, position: int) -> Header:
    if position + 10 > len(data):
        raise HeaderError(Status.TRUNCATED, f"JPEG ends inside its header at byte {len(data)}")
    precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
    if marker not in _DECODABLE_FRAMES:
        raise HeaderError(
            Status.UNSUPPORTED, f"JPEG process SOF{marker & 15}; supported: baseline, progressive"
        )
    if precision != 8 or components not in (1, 3, 4):
        raise HeaderError(Status.UNSUPPORTED, f"JPEG of {precision} bits, {components} components")
    if width == 0 or height == 0:
        raise HeaderError(Status.CORRUPT, f"JPEG of {width} x {height} pixels")
    if data.rfind(b"\xff\xd9", position) < 0:
        raise HeaderError(Status.TRUNCATED, f"JPEG ends at byte {len(data)} without its end marker")
    return Header("jpeg", width, height)


def _png(data: bytes) -> Header:
    if len(data) < 33:
        raise HeaderError(Status.TRUNCATED, f"PNG ends inside its header at byte {len(data)}")
    length, kind, width, height, depth, colour = struct.unpack_from(">I4sIIBB", data, 8)
    if kind != b"IHDR" or length != 13 or depth not in _PNG_DEPTHS.get(colour, ()):
        raise HeaderError(Status.CORRUPT, f"PNG header of depth {depth}, colour type {colour}")
    if not (0 < width < 1 << 31 and 0 < height < 1 << 31):
        raise HeaderError(Status.CORRUPT, f"PNG of {width} x {height} pixels")
    chunks = _png_chunks(data)
    deep = depth == 16 or colour in (4, 6) or b"tRNS" in chunks
    return Header("png", width, height, deep, ("first_frame",) if b"acTL" in chunks else ())


def _png_chunks(data: bytes) -> set[bytes]:
    """The kinds of all chunks up to IEND, which has to be there."""
    position, size = 33, len(data)
    kinds: set[bytes] = set()
    for _ in range(MAX_PNG_CHUNKS):
        if position + 12 > size:
            raise HeaderError(Status.TRUNCATED, f"PNG ends at byte {size} without its end chunk")
        kind = data[position + 4 : position + 8]
        if kind == b"IEND":
            return kinds
        kinds.add(kind)
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise HeaderError(Status.CORRUPT, f"PNG of more than {MAX_PNG_CHUNKS} chunks")
