"""PNM: text or a raster, read without a library."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from engine.core.records import Header
from engine.formats.pnm import PnmLayout
from engine.preprocess.codecs.gray import Gray, Samples, to_gray

_COMMENT = re.compile(rb"#[^\r\n]*")
_GAP = re.compile(rb"[ \t\n\v\f\r]")
_GAPS = b" \t\n\v\f\r"
_PIECE = 1 << 20  # bytes of text turned into numbers at once


def decode(data: bytes, header: Header) -> Gray:
    layout: PnmLayout = header.layout
    shape = (header.height, header.width, layout.channels)
    if layout.white == 0:
        return (1 - _read_bitmap(data, layout, header.height, header.width)) * np.uint8(255)
    samples = (
        _read_plain_samples(data, layout, shape) if layout.plain else _read_raw_samples(data, layout, shape)
    )
    if samples.max() > layout.white:
        raise ValueError(f"a sample is over {layout.white}, the declared maximum")
    # writers of 16-bit samples declare 65535 for any number of significant bits
    return to_gray(samples, white=layout.white if layout.white < 65535 else None)


def _read_bitmap(data: bytes, layout: PnmLayout, height: int, width: int) -> Gray:
    """Read a bitmap, in which 1 is black."""
    if not layout.plain:
        packed = np.frombuffer(data, np.uint8, (width + 7) // 8 * height, layout.start)
        return np.unpackbits(packed.reshape(height, -1), axis=1)[:, :width]
    digits = _COMMENT.sub(b"", data[layout.start :]).translate(None, _GAPS)[: height * width]
    bits = np.frombuffer(digits, np.uint8) - np.uint8(ord("0"))
    if len(bits) < height * width or bits.max() > 1:
        raise ValueError(f"it does not have {height * width} pixels of 0 or 1")
    return bits.reshape(height, width)


def _read_raw_samples(data: bytes, layout: PnmLayout, shape: tuple[int, int, int]) -> Samples:
    count = shape[0] * shape[1] * shape[2]
    if layout.white < 256:
        return np.frombuffer(data, np.uint8, count, layout.start).reshape(shape)
    return np.frombuffer(data, ">u2", count, layout.start).astype(np.uint16).reshape(shape)


def _read_plain_samples(data: bytes, layout: PnmLayout, shape: tuple[int, int, int]) -> Samples:
    """Parse the samples of a plain file, one piece of its text at a time."""
    text = _COMMENT.sub(b"", data[layout.start :])
    count = shape[0] * shape[1] * shape[2]
    samples: Samples = np.empty(count, np.uint8) if layout.white < 256 else np.empty(count, np.uint16)
    filled = position = 0
    while filled < len(samples) and position < len(text):
        gap = _GAP.search(text, position + _PIECE)
        end = gap.start() if gap else len(text)
        numbers = _parse_numbers(text[position:end], layout.white)[: len(samples) - filled]
        samples[filled : filled + len(numbers)] = numbers
        filled, position = filled + len(numbers), end
    if filled < len(samples):
        raise ValueError(f"it has {filled} of {len(samples)} samples")
    return samples.reshape(shape)


def _parse_numbers(text: bytes, white: int) -> npt.NDArray[np.int64]:
    if text.translate(None, b"0123456789" + _GAPS):
        raise ValueError("a sample is not a number")
    if not text.strip(_GAPS):
        return np.empty(0, np.int64)
    numbers = np.fromstring(text, np.int64, sep=" ")
    if numbers.max() > white or numbers.min() < 0:  # an overflow may give a negative number
        raise ValueError(f"a sample is over {white}, the declared maximum")
    return numbers
