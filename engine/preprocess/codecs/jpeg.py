"""JPEG by libjpeg-turbo, strictly: what it decodes only with a warning is damaged."""

from __future__ import annotations

import imagecodecs
import numpy as np
import simplejpeg

from engine.header import Header
from engine.header.jpeg import Layout
from engine.preprocess.codecs import codec
from engine.preprocess.codecs.gray import Gray, to_gray

# warnings about valid pixels; only the first of an image's warnings is told, so that it may hide another
_HARMLESS = (
    "tjDecompressHeader3(): Could not determine subsampling level",  # unusual ones are decoded all the same
    "Corrupt JPEG data: bad ICC marker",
    "Invalid SOS parameters for sequential JPEG",
    "Unknown Adobe color transform code",
    "Warning: unknown JFIF revision number",
)


def decode(data: bytes, header: Header) -> tuple[Gray, list[str]]:
    """Gray uint8 [H, W] as stored, and flags: "decoder_warning" where damage could go unseen."""
    layout: Layout = header.layout
    space, flags = ("CMYK" if layout.channels == 4 else "GRAY"), []
    try:
        samples = simplejpeg.decode_jpeg(data, space, strict=True)
    except ValueError as error:
        if not str(error).startswith(_HARMLESS):
            raise
        space = "GRAYSCALE" if space == "GRAY" else space
        samples = codec.run(imagecodecs.jpeg8_decode, data, outcolorspace=space)
        flags = ["decoder_warning"]
    if layout.channels == 4:
        return _from_cmyk(samples, inverted=layout.adobe), flags
    return samples.reshape(samples.shape[:2]), flags


def _from_cmyk(samples: Gray, *, inverted: bool) -> Gray:
    """[H, W, 4] to gray; red is what neither cyan nor black takes, and so on."""
    light = samples if inverted else 255 - samples
    colour = (light[:, :, :3].astype(np.uint16) * light[:, :, 3:] + 127) // 255
    return to_gray(colour.astype(np.uint8))
