"""PNG by libpng, with every checksum that the pixels depend on."""

from __future__ import annotations

import zlib

import imagecodecs
import numpy as np

from engine.core.records import Header
from engine.formats.png import chunks
from engine.preprocess.codecs import imagecodecs_call
from engine.preprocess.codecs.gray import Gray, Samples, to_gray

_CHECKED = frozenset((b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"sBIT", b"IDAT"))


def decode(data: bytes, header: Header) -> Gray:
    # libpng drops a tRNS of wrong checksum with a warning, and stops reading at the last row
    view, significant = memoryview(data), 0
    for kind, start, end in chunks(data):
        if kind in _CHECKED and zlib.crc32(view[start - 4 : end]) != int.from_bytes(
            view[end : end + 4], "big"
        ):
            raise ValueError(f"wrong checksum of the {kind.decode()} chunk at byte {start - 8}")
        if kind == b"sBIT":
            significant = max(data[start:end], default=0)
    samples = imagecodecs_call.call_codec(imagecodecs.png_decode, data)
    return to_gray(samples, white=_white(samples, significant))


def _white(samples: Samples, significant: int) -> int | None:
    """White of 16-bit samples by sBIT: 65535, unless a writer left the significant bits at the low end."""
    if samples.dtype == np.uint8 or not 1 <= significant <= 16:
        return None
    return (1 << significant) - 1 if significant < 16 and samples.max() < 1 << significant else 65535
