"""JPEG 2000 by OpenJPEG, given the bare codestream: no palettes, no colour profiles."""

from __future__ import annotations

import imagecodecs

from engine.header.jpeg2000 import Layout
from engine.preprocess.codecs import codec
from engine.preprocess.codecs.gray import Gray, declared_white, to_gray
from engine.records import Header


def decode(data: bytes, header: Header) -> Gray:
    layout: Layout = header.layout
    samples = codec.run(imagecodecs.jpeg2k_decode, data[slice(*layout.codestream)], numthreads=1)
    if samples.ndim not in (2, 3) or samples.dtype.kind != "u" or samples.dtype.itemsize > 2:
        raise ValueError("the image is damaged")
    if layout.luma_first:
        samples = samples[:, :, :1]
    return to_gray(samples, white=declared_white(layout.bits))
