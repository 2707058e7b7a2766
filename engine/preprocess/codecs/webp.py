"""WebP by libwebp, which gets only the image's own chunks: no profiles, no later frames of an animation."""

from __future__ import annotations

import struct

import imagecodecs

from engine.core.records import Header
from engine.formats.webp import WebpLayout
from engine.preprocess.codecs import imagecodecs_call
from engine.preprocess.codecs.gray import Gray, to_gray

_ALPHA = 0x10


def decode(data: bytes, header: Header) -> Gray:
    layout: WebpLayout = header.layout
    body = _pad_chunk(data[slice(*layout.image)])
    if layout.alpha is not None:
        size = (header.width - 1).to_bytes(3, "little") + (header.height - 1).to_bytes(3, "little")
        extended = b"VP8X" + struct.pack("<IB3x", 10, _ALPHA) + size
        body = extended + _pad_chunk(data[slice(*layout.alpha)]) + body
    return to_gray(
        imagecodecs_call.call_codec(
            imagecodecs.webp_decode, b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
        )
    )


def _pad_chunk(chunk: bytes) -> bytes:
    return chunk + b"\0" * (len(chunk) % 2)
