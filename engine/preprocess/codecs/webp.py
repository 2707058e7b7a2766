"""WebP by libwebp, given the image's own chunks only: neither profiles nor an animation's other frames."""

from __future__ import annotations

import struct

import imagecodecs

from engine.header.webp import Layout
from engine.preprocess.codecs import codec
from engine.preprocess.codecs.gray import Gray, to_gray
from engine.records import Header

_ALPHA = 0x10


def decode(data: bytes, header: Header) -> Gray:
    layout: Layout = header.layout
    body = _padded(data[slice(*layout.image)])
    if layout.alpha is not None:
        size = (header.width - 1).to_bytes(3, "little") + (header.height - 1).to_bytes(3, "little")
        extended = b"VP8X" + struct.pack("<IB3x", 10, _ALPHA) + size
        body = extended + _padded(data[slice(*layout.alpha)]) + body
    return to_gray(
        codec.run(imagecodecs.webp_decode, b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body)
    )


def _padded(chunk: bytes) -> bytes:
    return chunk + b"\0" * (len(chunk) % 2)
