"""The orientation in an EXIF block: EXIF 2.32, tag 0x0112."""

from __future__ import annotations

import struct

_ORIENTATION = 0x0112


def orientation(block: bytes) -> int:
    """Return the orientation, 1 to 8; 1 where the block is invalid. "Exif\\0\\0" may come before it."""
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, directory)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", block, directory + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
