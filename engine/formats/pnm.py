"""PBM, PGM and PPM, plain and raw: the Netpbm manual."""

from __future__ import annotations

import re
from typing import NamedTuple

from engine.core.records import Header
from engine.formats.common import SizeLimit, corrupt, truncated

MAX_HEADER = 65_536  # bytes
_GAP = rb"(?:[ \t\n\v\f\r]|#[^\r\n]*[\r\n])+"
_SIZE = re.compile(rb"P([1-6])" + _GAP + rb"(\d{1,10})" + _GAP + rb"(\d{1,10})(?=[ \t\n\v\f\r#])")
_WHITE = re.compile(_GAP + rb"(\d{1,5})(?=[ \t\n\v\f\r])")


class PnmLayout(NamedTuple):
    plain: bool  # numbers as text
    channels: int  # 1 or 3
    white: int  # the largest sample; 0 for a bitmap, where 1 is black
    start: int  # byte of the first sample


def matches(data: bytes) -> bool:
    return data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in b" \t\n\v\f\r#" and len(data) > 2


def parse(data: bytes, limit: SizeLimit) -> Header:
    size = _SIZE.match(data, 0, MAX_HEADER)
    if size is None:
        raise _header_error(data)
    kind, width, height = (int(group) for group in size.groups())
    limit.check("PNM", width, height)
    position, white = size.end(), 0
    if kind not in (1, 4):
        maxval = _WHITE.match(data, position, position + MAX_HEADER)
        if maxval is None:
            raise _header_error(data)
        white, position = int(maxval[1]), maxval.end()
        if not 0 < white < 1 << 16:
            raise corrupt(f"the PNM header declares {white} as its largest sample; allowed: 1 to 65535")
    plain, channels = kind <= 3, 3 if kind in (3, 6) else 1
    if plain:
        row = width * channels * (1 if white == 0 else 2)  # at least one character for each sample and gap
        end = position + row * height
    else:
        row = (width + 7) // 8 if white == 0 else width * channels * (1 if white < 256 else 2)
        end = position + 1 + row * height
    if end > len(data):
        raise truncated(f"the PNM file ends at byte {len(data)} of {end}{' or more' if plain else ''}")
    layout = PnmLayout(plain, channels, white, position + 1)
    return Header("pnm", width, height, (), 1, layout, max(1, white.bit_length()))


def _header_error(data: bytes) -> Exception:
    if len(data) < MAX_HEADER and re.fullmatch(rb"P[1-6](?:[ \t\n\v\f\r\d]|#[^\r\n]*(?:[\r\n]|$))*", data):
        return truncated(f"the PNM file ends inside its header at byte {len(data)}")
    return corrupt("the PNM file has no valid header")
