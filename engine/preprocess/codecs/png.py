"""PNG by libpng; the checksums of all chunks that the pixels depend on are checked."""

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
    # libpng ignores a tRNS chunk with a wrong checksum and stops reading at the last row
    view, significant = memoryview(data), 0
    for kind, start, end in chunks(data):
        if kind in _CHECKED and zlib.crc32(view[start - 4 : end]) != int.from_bytes(
            view[end : end + 4], "big"
        ):
            raise ValueError(f"the {kind.decode()} chunk at byte {start - 8} has a wrong checksum")
        if kind == b"sBIT":
            significant = max(data[start:end], default=0)
    samples = imagecodecs_call.call_codec(imagecodecs.png_decode, data)
    return to_gray(samples, white=_white(samples, significant))


def _white(samples: Samples, significant: int) -> int | None:
    """Return the white of 16-bit samples with sBIT: 65535, unless the significant bits are the low ones."""
    if samples.dtype == np.uint8 or not 1 <= significant <= 16:
        return None
    return (1 << significant) - 1 if significant < 16 and samples.max() < 1 << significant else 65535
