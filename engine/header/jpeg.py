"""JPEG: ITU-T T.81, annex B; the Exif segment's orientation; the Adobe segment, which inverts CMYK."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from engine.header import exif
from engine.header.common import Header, Limit, corrupt, truncated, unsupported

MAX_SEGMENTS = 10_000
MAX_SCANS = 100  # each scan costs a pass over the whole image
_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_DECODABLE_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive; all Huffman-coded
_FILL = re.compile(rb"\xff+")


class Layout(NamedTuple):
    channels: int  # 1, 3 or 4
    adobe: bool  # CMYK is stored inverted


def matches(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def parse(data: bytes, limit: Limit) -> Header:
    position, orientation, adobe = 2, 1, False
    frame: tuple[int, int] | None = None
    for _ in range(MAX_SEGMENTS):
        fill = _FILL.match(data, position)
        if fill is None and position < len(data):
            raise corrupt(f"JPEG marker expected at byte {position}")
        position = fill.end() if fill else position
        marker, length = struct.unpack_from(">BH", data, position)
        body = position + 3
        if marker in _FRAMES and frame is None:
            frame = marker, _channels(data, marker, body, limit)
        if marker == 0xE1 and data.startswith(b"Exif\0\0", body) and orientation == 1:
            orientation = exif.orientation(data[body : body + length - 2])
        if marker == 0xEE and data.startswith(b"Adobe", body):
            adobe = True
        if marker == 0xDA and frame:
            _check_scans(data, *frame, position)
            assert limit.size is not None
            return Header("jpeg", *limit.size, orientation=orientation, layout=Layout(frame[1], adobe))
        if marker in (0xD9, 0xDA) or length < 2:
            raise corrupt("JPEG without a frame header")
        position += 1 + length
    raise corrupt(f"JPEG of more than {MAX_SEGMENTS} segments before its first scan")


def _channels(data: bytes, marker: int, body: int, limit: Limit) -> int:
    precision, height, width, channels = struct.unpack_from(">BHHB", data, body)
    limit.check("JPEG", width, height)
    if marker not in _DECODABLE_FRAMES:
        raise unsupported(f"JPEG process SOF{marker & 15}; supported: baseline, progressive")
    if precision != 8 or channels not in (1, 3, 4):
        raise unsupported(f"JPEG of {precision} bits, {channels} components")
    return int(channels)


def _check_scans(data: bytes, marker: int, channels: int, start: int) -> None:
    if data.rfind(b"\xff\xd9", start) < 0:
        raise truncated(f"JPEG ends at byte {len(data)} without its end marker")
    scans = 1 + data.count(b"\xff\xda", start) if channels > 1 or marker == 0xC2 else 1
    if scans > MAX_SCANS:
        raise corrupt(f"JPEG of {scans} scans; at most {MAX_SCANS}")
