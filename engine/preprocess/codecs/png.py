"""PNG by libpng, with every checksum that the pixels depend on."""

from __future__ import annotations

import zlib

import imagecodecs

from engine.header import Header
from engine.header.png import chunks
from engine.preprocess.codecs import codec
from engine.preprocess.codecs.gray import Gray, to_gray

_CHECKED = frozenset((b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT"))


def decode(data: bytes, header: Header) -> Gray:
    # libpng drops a tRNS of wrong checksum with a warning, and stops reading at the last row
    view = memoryview(data)
    for kind, start, end in chunks(data):
        if kind in _CHECKED and zlib.crc32(view[start - 4 : end]) != int.from_bytes(
            view[end : end + 4], "big"
        ):
            raise ValueError(f"wrong checksum of the {kind.decode()} chunk at byte {start - 8}")
    return to_gray(codec.run(imagecodecs.png_decode, data))
