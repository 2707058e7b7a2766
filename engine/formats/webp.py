"""WebP: Google's container specification; lossy, lossless, with alpha, the first frame of an animation."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from engine.core.records import Header
from engine.formats import exif
from engine.formats.common import SizeLimit, corrupt, truncated, unsupported

MAX_CHUNKS = 10_000
_ANIMATED, _LOSSLESS_SIGNATURE, _LOSSY_SIGNATURE = 0x02, 0x2F, b"\x9d\x01\x2a"


class WebpLayout(NamedTuple):
    """Spans (first byte, end) of chunks, including their 8-byte headers."""

    image: tuple[int, int]  # VP8 or VP8L
    alpha: tuple[int, int] | None  # ALPH


class _Chunk(NamedTuple):
    kind: bytes
    start: int  # of the body
    end: int


def matches(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] in (b"WEBP", b"WEB", b"WE", b"W", b"")


def parse(data: bytes, limit: SizeLimit) -> Header:
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    kind, length = struct.unpack_from("<4sI", data, 12)
    first = _Chunk(kind, 20, 20 + length)
    extended = first.kind == b"VP8X"
    canvas = _canvas(data) if extended else _frame_size(data, first)
    limit.check("WebP", *canvas)
    if end > len(data):
        raise truncated(f"the WebP file ends at byte {len(data)} of {end}")
    chunks = list(_chunks(data, 12, end))
    frames = [chunk for chunk in chunks if chunk.kind == b"ANMF"]
    animated = extended and bool(data[20] & _ANIMATED)
    if animated and not frames:
        raise corrupt("the WebP animation has no frames")
    if animated:
        _check_first_frame(data, frames[0], canvas)
        layout = _layout(data, list(_chunks(data, frames[0].start + 16, frames[0].end)), canvas)
    else:
        layout = _layout(data, chunks, canvas)
    blocks = [data[chunk.start : chunk.end] for chunk in chunks if chunk.kind == b"EXIF"]
    orientation = exif.orientation(blocks[0]) if blocks else 1
    flags = ("first_frame",) if animated and len(frames) > 1 else ()
    return Header("webp", *canvas, flags, orientation, layout)


def _canvas(data: bytes) -> tuple[int, int]:
    struct.unpack_from("<10x", data, 20)
    return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")


def _frame_size(data: bytes, chunk: _Chunk) -> tuple[int, int]:
    """Return width and height of a VP8 or VP8L chunk."""
    if chunk.kind == b"VP8L":
        signature, bits = struct.unpack_from("<BI", data, chunk.start)
        if signature == _LOSSLESS_SIGNATURE and chunk.end - chunk.start > 5:
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif chunk.kind == b"VP8 ":
        signature, width, height = struct.unpack_from("<3x3sHH", data, chunk.start)
        if signature == _LOSSY_SIGNATURE and chunk.end - chunk.start > 10:
            return width & 0x3FFF, height & 0x3FFF
    raise corrupt("the WebP file has no valid image chunk")


def _chunks(data: bytes, position: int, end: int) -> Iterator[_Chunk]:
    for _ in range(MAX_CHUNKS):
        if position + 8 > end:
            return
        kind, size = struct.unpack_from("<4sI", data, position)
        if position + 8 + size > end:
            raise corrupt(f"the WebP chunk of {size} bytes at byte {position} is longer than its container")
        yield _Chunk(kind, position + 8, position + 8 + size)
        position += 8 + size + size % 2
    raise corrupt(f"the WebP file has more than {MAX_CHUNKS} chunks")


def _check_first_frame(data: bytes, frame: _Chunk, canvas: tuple[int, int]) -> None:
    if frame.end - frame.start < 16:
        raise corrupt("the first frame of the WebP animation is empty")
    x, y, width, height = (
        int.from_bytes(data[frame.start + offset : frame.start + offset + 3], "little")
        for offset in (0, 3, 6, 9)
    )
    if (x, y, width + 1, height + 1) != (0, 0, *canvas):
        raise unsupported("a WebP animation whose first frame does not fill the canvas")


def _layout(data: bytes, chunks: list[_Chunk], canvas: tuple[int, int]) -> WebpLayout:
    images = [chunk for chunk in chunks if chunk.kind in (b"VP8 ", b"VP8L")]
    if not images:
        raise corrupt("the WebP file has no valid image chunk")
    size = _frame_size(data, images[0])
    if size != canvas:
        raise corrupt(
            f"the WebP image has {size[0]} x {size[1]} pixels, its canvas {canvas[0]} x {canvas[1]}"
        )
    alpha = [chunk for chunk in chunks if chunk.kind == b"ALPH" and images[0].kind == b"VP8 "]
    return WebpLayout(
        (images[0].start - 8, images[0].end), (alpha[0].start - 8, alpha[0].end) if alpha else None
    )
