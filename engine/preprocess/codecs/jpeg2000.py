"""JPEG 2000 by OpenJPEG, which gets only the codestream: no palettes, no colour profiles."""

from __future__ import annotations

import imagecodecs

from engine.core.records import Header
from engine.formats.jpeg2000 import Jpeg2000Layout
from engine.preprocess.codecs import imagecodecs_call
from engine.preprocess.codecs.gray import Gray, declared_white, to_gray


def decode(data: bytes, header: Header) -> Gray:
    layout: Jpeg2000Layout = header.layout
    samples = imagecodecs_call.call_codec(
        imagecodecs.jpeg2k_decode, data[slice(*layout.codestream)], numthreads=1
    )
    if samples.ndim not in (2, 3) or samples.dtype.kind != "u" or samples.dtype.itemsize > 2:
        raise ValueError("the image is damaged")
    if layout.luma_first:
        samples = samples[:, :, :1]
    return to_gray(samples, white=declared_white(layout.bits))
