"""JPEG: ITU-T T.81, annex B, with the Exif segment (orientation) and the Adobe segment (inverted CMYK)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engine.core.records import Header
from engine.formats import exif
from engine.formats.common import HeaderError, SizeLimit, corrupt, truncated, unsupported

MAX_SEGMENTS = 10_000
MAX_SCANS = 100  # each scan costs a pass over the whole image
_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_JPEG_LS = 0xF7
_DECODABLE_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive; all Huffman-coded
_BETWEEN_SCANS = frozenset((0xC4, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
_ZEROS = bytes(48)  # entropy coding of flat areas rarely gives as many zeros
_FILL = re.compile(rb"\xff+")


class JpegLayout(NamedTuple):
    channels: int  # 1, 3 or 4
    adobe: bool  # CMYK is stored inverted


def matches(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def parse(data: bytes, limit: SizeLimit) -> Header:
    orientation, adobe = 1, False
    frame: tuple[int, int] | None = None
    for marker, start, body, length in _segments(data):
        if marker in _FRAMES and frame is None:
            frame = marker, _channels(data, marker, body, limit)
        if marker == 0xE1 and data.startswith(b"Exif\0\0", body) and orientation == 1:
            orientation = exif.orientation(data[body : body + length - 2])
        if marker == 0xEE and data.startswith(b"Adobe", body):
            adobe = True
        if marker == 0xDA and frame:
            _check_scans(data, *frame, start)
            assert limit.size is not None
            return Header("jpeg", *limit.size, orientation=orientation, layout=JpegLayout(frame[1], adobe))
        if marker in (0xD9, 0xDA) or length < 2:
            raise corrupt("the JPEG file has no frame header")
    raise corrupt(f"the JPEG file has more than {MAX_SEGMENTS} segments before its first scan")


def frame_header(data: bytes) -> tuple[int, int, int, int, int]:
    """Return marker, bits, height, width and components of the frame header, also of JPEG-LS.

    Raises ValueError.
    """
    try:
        for marker, _, body, length in _segments(data):
            if marker in _FRAMES or marker == _JPEG_LS:
                return (marker, *struct.unpack_from(">BHHB", data, body))
            if marker in (0xD9, 0xDA) or length < 2:
                break
    except (struct.error, HeaderError):
        pass
    raise ValueError("the JPEG file has no frame header")


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield marker, first byte, first byte of the body and length of each segment, including scans."""
    position = 2
    for _ in range(MAX_SEGMENTS):
        fill = _FILL.match(data, position)
        if fill is None and position < len(data):
            raise corrupt(f"the JPEG file has no marker at byte {position}, where one is expected")
        position = fill.end() if fill else position
        marker, length = struct.unpack_from(">BH", data, position)
        yield marker, position, position + 3, length
        position += 1 + length


def _channels(data: bytes, marker: int, body: int, limit: SizeLimit) -> int:
    precision, height, width, channels = struct.unpack_from(">BHHB", data, body)
    limit.check("JPEG", width, height)
    if marker not in _DECODABLE_FRAMES:
        raise unsupported(f"JPEG process SOF{marker & 15}", "baseline, progressive")
    if precision != 8 or channels not in (1, 3, 4):
        raise unsupported(f"JPEG of {precision} bits and {channels} components", "8 bits, 1, 3 or 4")
    return int(channels)


def _check_scans(data: bytes, marker: int, channels: int, start: int) -> None:
    if data.rfind(b"\xff\xd9", start) < 0:
        raise truncated(f"the JPEG file ends at byte {len(data)} without its end marker")
    scans = 1 + data.count(b"\xff\xda", start) if channels > 1 or marker == 0xC2 else 1
    if scans > MAX_SCANS:
        raise corrupt(f"the JPEG file has {scans} scans; at most {MAX_SCANS} are allowed")


def looks_damaged(data: bytes) -> bool:
    """Return whether the entropy-coded part of a JPEG that `parse` accepted looks damaged.

    This check is for decoders that give no warnings. It looks for markers that are not allowed there, restart
    markers out of order or in a wrong number, and long runs of zeros. Neither answer is certain.
    """
    try:
        interval, restarts, scan = _read_scan_start(data)
    except (struct.error, IndexError, ZeroDivisionError):
        return True
    if _ZEROS in data:
        return True
    stream = np.frombuffer(data, np.uint8)
    escapes = np.flatnonzero(stream[scan:-1] == 0xFF) + scan
    codes = stream[escapes + 1]
    markers, codes = escapes[codes != 0], codes[codes != 0]
    end, position = 0, 0
    while position < len(markers):  # one round for each scan and each segment between them
        if markers[position] < end:  # inside a segment
            position += 1
            continue
        ends = np.flatnonzero((codes[position:] < 0xD0) | (codes[position:] > 0xD7))
        if not len(ends):
            return True
        numbers = codes[position : position + ends[0]].astype(np.intp) - 0xD0
        if not np.array_equal(numbers, np.arange(len(numbers)) % 8) or (len(numbers) and not interval):
            return True
        position += int(ends[0])
        code = int(codes[position])
        if code == 0xD9:
            return restarts is not None and len(numbers) != restarts
        if code not in _BETWEEN_SCANS:
            return True
        restarts = None  # with several scans they are not counted
        end = (
            int(markers[position])
            + 2
            + int.from_bytes(data[markers[position] + 2 : markers[position] + 4], "big")
        )
        position += 1
    return True


def _read_scan_start(data: bytes) -> tuple[int, int | None, int]:
    """Return the restart interval, the expected number of restart markers, and the scan's first byte."""
    position, interval, units = 2, 0, 0
    while True:
        while data[position + 1] == 0xFF:
            position += 1
        marker, length = struct.unpack_from(">BH", data, position + 1)
        body = position + 4
        if marker == 0xDD:
            (interval,) = struct.unpack_from(">H", data, body)
        if marker in _DECODABLE_FRAMES:
            height, width, channels = struct.unpack_from(">HHB", data, body + 1)
            factors = [data[body + 7 + 3 * channel] for channel in range(channels)]
            across, down = max(factor >> 4 for factor in factors), max(factor & 15 for factor in factors)
            if channels == 1:
                across = down = 1  # a scan of one component counts blocks and ignores the factors
            units = -(-width // (8 * across)) * -(-height // (8 * down))
        if marker == 0xDA:
            single_scan = bool(units) and data[body] == len(factors)
            restarts = (-(-units // interval) - 1 if interval else 0) if single_scan else None
            return interval, restarts, body + length - 2
        position += 2 + length
