"""PNG: W3C recommendation, second edition, with APNG's acTL chunk."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from engine.core.records import Header
from engine.formats import exif
from engine.formats.common import SizeLimit, corrupt, truncated

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 200_000
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def matches(data: bytes) -> bool:
    return data.startswith(SIGNATURE)


def parse(data: bytes, limit: SizeLimit) -> Header:
    length, kind, width, height, depth, colour = struct.unpack_from(">I4sIIBB", data, 8)
    if kind != b"IHDR" or length != 13:
        raise corrupt("the PNG file has no valid header chunk")
    limit.check("PNG", width, height)
    if depth not in _DEPTHS.get(colour, ()):
        raise corrupt(f"the PNG header declares depth {depth} with colour type {colour}")
    kinds: set[bytes] = set()
    orientation = 1
    for kind, start, end in chunks(data):
        if kind == b"eXIf" and b"IDAT" not in kinds:
            orientation = exif.orientation(data[start:end])
        kinds.add(kind)
    flags = ("first_frame",) if b"acTL" in kinds else ()
    return Header("png", width, height, flags, orientation, bits=depth)


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the body of each chunk before IEND. Raises HeaderError without IEND."""
    position, size = 8, len(data)
    for _ in range(MAX_CHUNKS):
        if position + 12 > size:
            raise truncated(f"the PNG file ends at byte {size} without its end chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return
        yield kind, position + 8, position + 8 + length
        position += 12 + length
    raise corrupt(f"the PNG file has more than {MAX_CHUNKS} chunks")
